"""Conversations tokenised once and kept on disk: CACHE_DIR/FINGERPRINT holds the files of `store_files`.

The fingerprint covers the contents of the sources, tokenizer and chat template, and the options: whatever changes
the tokens makes another directory. A directory takes its name when it is whole, so a build that was killed leaves
nothing that is read, and of two builders at once the later one finds the work done.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from mcore_spec.data.chat import (
    ChatEncoder,
    EncodedConversation,
    RenderedConversation,
    Tokenizer,
    check_tokenizer,
    load_tokenizer,
)
from mcore_spec.data.conversations import ConversationReader, OnBadLine
from mcore_spec.data.store_files import FORMAT_VERSION, MANIFEST, StoreCounts, StoreWriter, TokenStore
from mcore_spec.errors import ConfigError
from mcore_spec.parallel.layout import run_on_every_rank, run_on_rank_zero

__all__ = ["StoreCounts", "TokenStore", "build_token_store"]

_CONVERSATIONS_AT_ONCE = 512
# A build that has not written for so long was killed.
_ABANDONED_AFTER_S = 24 * 3600.0
_SHOWN_CHARACTERS = 400


def build_token_store(
    sources: Sequence[str | Path],
    tokenizer: Tokenizer | str | Path,
    *,
    cache_dir: Path,
    seq_length: int,
    on_bad_line: OnBadLine = "error",
    vocab_size: int | None = None,
) -> TokenStore:
    """The token store of some conversations: made by rank 0 unless it is there, opened by every rank.

    Args:
        sources: files and datasets; see `open_source`.
        tokenizer: with a chat template; or its directory or hub id, which only rank 0 then loads.
        cache_dir: where stores are kept; the same for every rank.
        seq_length: longer documents lose their end.
        on_bad_line: raise at an entry that cannot be read or rendered, or leave it out and count it.
        vocab_size: entries of the base's vocabulary, where the tokenizer is to be checked against it.

    Raises:
        ConfigError: what `ConversationReader`, `ChatEncoder` and `check_tokenizer` refuse; nothing to learn in any
            conversation; a cache that is damaged or cannot be written.
    """

    def build() -> Path:
        loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
        if vocab_size is not None:
            check_tokenizer(loaded, vocab_size, f"tokenizer_model = {loaded.name_or_path}")
        reader = ConversationReader(sources, on_bad_line=on_bad_line)
        return _Builder(reader, ChatEncoder(loaded), seq_length=seq_length).find_or_build(cache_dir)

    directory = run_on_rank_zero(build)
    return run_on_every_rank(lambda: TokenStore(directory))


class _Builder:
    """One build, on one rank."""

    def __init__(self, reader: ConversationReader, encoder: ChatEncoder, *, seq_length: int) -> None:
        self.reader, self.encoder, self.seq_length = reader, encoder, seq_length
        self.truncated, self.empty = 0, 0
        self.first_empty: str | None = None
        settings = {
            "format": FORMAT_VERSION,
            "sources": [source.digest() for source in reader.sources],
            "tokenizer": encoder.fingerprint(),
            "seq_length": seq_length,
            "on_bad_line": reader.on_bad_line,
        }
        self.fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def find_or_build(self, cache_dir: Path) -> Path:
        """The finished directory."""
        final = cache_dir / self.fingerprint
        if final.exists():
            return final
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned(cache_dir)
            partial = Path(tempfile.mkdtemp(prefix=self._partial_prefix, dir=cache_dir))
            try:
                # mkdtemp makes a directory for its owner alone; a cache may be shared.
                partial.chmod(cache_dir.stat().st_mode & 0o777)
                self._write(partial)
                _publish(partial, final)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        except OSError as error:
            raise ConfigError(
                f"data_cache_path = {cache_dir} cannot be written ({error.strerror or error}); make room, or give "
                "another directory"
            ) from error
        return final

    @property
    def _partial_prefix(self) -> str:
        return f".partial-{self.fingerprint[:16]}-"

    def _remove_abandoned(self, cache_dir: Path) -> None:
        """What killed builds of the same store left behind. A living one writes all the time."""
        for directory in cache_dir.glob(f"{self._partial_prefix}*"):
            with suppress(FileNotFoundError):  # another builder is just done with it
                newest = max(path.stat().st_mtime for path in (directory, *directory.iterdir()))
                if time.time() - newest > _ABANDONED_AFTER_S:
                    shutil.rmtree(directory, ignore_errors=True)

    def _write(self, directory: Path) -> None:
        with StoreWriter(directory) as writer:
            for conversation in self._encoded():
                writer.append(conversation.token_ids, conversation.loss_mask)
        if writer.num_documents == 0:
            raise ConfigError(self._describe_nothing())
        counts = StoreCounts(
            documents=writer.num_documents,
            tokens=writer.num_tokens,
            masked_tokens=writer.num_masked,
            truncated=self.truncated,
            empty=self.empty,
            skipped=self.reader.num_skipped,
            skip_reasons=tuple(self.reader.reasons),
        )
        sources = [source.name for source in self.reader.sources]
        writer.finish(fingerprint=self.fingerprint, seq_length=self.seq_length, sources=sources, counts=counts)

    def _encoded(self) -> Iterator[EncodedConversation]:
        """Conversations that have something to learn, cut to the sequence length."""
        rendered = self._rendered()
        while chunk := list(islice(rendered, _CONVERSATIONS_AT_ONCE)):
            for text, conversation in zip(chunk, self.encoder.tokenize(chunk), strict=True):
                token_ids = conversation.token_ids[: self.seq_length]
                loss_mask = conversation.loss_mask[: self.seq_length]
                if not any(loss_mask):
                    self.empty += 1
                    self.first_empty = self.first_empty or text.text
                    continue
                self.truncated += len(token_ids) < len(conversation.token_ids)
                yield EncodedConversation(token_ids, loss_mask)

    def _rendered(self) -> Iterator[RenderedConversation]:
        for conversation in self.reader:
            try:
                rendered = self.encoder.render(conversation.messages)
            except ConfigError as error:
                self.reader.skip(conversation.where, str(error))
                continue
            yield rendered

    def _describe_nothing(self) -> str:
        names = ", ".join(source.name for source in self.reader.sources)
        if self.first_empty is None:
            return (
                f"data_path = {names}: every entry is bad ({self.reader.num_skipped} skipped); correct them. "
                f"The first: {self.reader.reasons[0]}"
            )
        shown = self.first_empty
        if len(shown) > _SHOWN_CHARACTERS:
            half = _SHOWN_CHARACTERS // 2
            shown = f"{shown[:half]} ... {shown[-half:]}"
        return (
            f"data_path = {names}: within seq_length = {self.seq_length} no conversation has a token that the model "
            f"must produce ({self.empty} without, {self.reader.num_skipped} skipped); raise seq_length, or check the "
            f"chat template, which makes of the first one: {shown!r}"
        )


def _publish(partial: Path, final: Path) -> None:
    try:
        partial.rename(final)
    except OSError:
        # Another builder was faster: its files are the same.
        if not (final / MANIFEST).exists():
            raise
