"""A disk that fills up while something is written: exit code 2, and what was there before is there."""

from __future__ import annotations

import re
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mcore_spec.checkpoint.store import TRACKER
from mcore_spec.cli.main import run_command
from tests.e2e.conftest import Done, Run, check_refused, make_base, tree
from tests.e2e.disk import Disk, mounted_disk
from tests.pool import RankPool

pytestmark = pytest.mark.e2e


@contextmanager
def small_disk(directory: Path, *, num_bytes: int) -> Iterator[Path]:
    """A place that takes no more than `num_bytes`: a tmpfs where mounting is permitted.

    Where it is not (no root, a container without the right), a limit on the size of files, which the system
    reports in the same place with another number: EFBIG instead of ENOSPC.
    """
    directory.mkdir()
    options = f"size={num_bytes},mode=0755"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], capture_output=True)
    if mounted.returncode == 0:
        try:
            yield directory
        finally:
            subprocess.run(["umount", "--lazy", str(directory)], check=True)
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes // 2, limits[1]))
    try:
        yield directory
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of some 4 MB and its checkpoint with a draft."""
    root = tmp_path_factory.mktemp("big")
    base = make_base(root / "base", vocab_size=8000, hidden_size=64)
    words = ["--pretrained-model-path", str(base), "--export-algorithm", "medusa", "--save", str(root / "checkpoint")]
    assert run_command("convert", words) == 0
    return base, root / "checkpoint"


@pytest.mark.parametrize("num_bytes", [64 << 10, 1 << 20, 5 << 20])
def test_a_full_disk_while_saving(num_bytes: int, big, run: Run, tmp_path: Path) -> None:
    base, _ = big
    with small_disk(tmp_path / "disk", num_bytes=num_bytes) as disk:
        words = ("--pretrained-model-path", base, "--export-algorithm", "medusa", "--save", disk / "checkpoint")
        check_refused(run("convert", *words), "save", disk / "checkpoint", "free space or choose another")
        assert [path for path in tree(disk) if (disk / path).is_file()] == []


def test_a_disk_that_is_full_keeps_what_was_saved(run: Run, base_dir: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", num_bytes=1 << 20) as disk:
        words = ("--pretrained-model-path", base_dir, "--export-algorithm", "medusa", "--save", disk / "checkpoint")
        outcomes = [run("convert", *words)]
        while outcomes[-1].code == 0:
            before = tree(disk)
            outcomes.append(run("convert", *words))
        assert len(outcomes) > 1, "the disk was too small for one checkpoint"
        check_refused(outcomes[-1], "save", disk / "checkpoint", "free space or choose another")
        assert tree(disk) == before
        export = ("export", "--load", disk / "checkpoint", "--export-dir", tmp_path / "export")
        assert run(*export, "--export-extra-modules").code == 0


@pytest.mark.parametrize("what", [(), ("--export-extra-modules",)])
@pytest.mark.parametrize("num_bytes", [16 << 10, 1 << 20, 2 << 20])
def test_a_full_disk_while_exporting(num_bytes: int, what: tuple[str, ...], big, run: Run, tmp_path: Path) -> None:
    _, checkpoint = big
    with small_disk(tmp_path / "disk", num_bytes=num_bytes) as disk:
        done = run("export", "--load", checkpoint, "--export-dir", disk / "export", *what)
        check_refused(done, disk, "free space or choose another --export-dir")
        assert tree(disk) == {}


@pytest.mark.parametrize("layout", ["--tensor-model-parallel-size", "--pipeline-model-parallel-size"])
@pytest.mark.parametrize("what", [[], ["--export-extra-modules"]])
def test_a_full_disk_stops_every_rank(layout: str, what: list[str], big, rank_pool: RankPool, tmp_path: Path) -> None:
    """Only one rank writes and fails; the others are told, and none waits for it."""
    _, checkpoint = big
    with small_disk(tmp_path / "disk", num_bytes=16 << 10) as disk:
        words = ["--load", str(checkpoint), "--export-dir", str(disk / "export"), layout, "2", *what]
        codes = rank_pool.run("tests.e2e.rank_cases:exit_code", world_size=2, command="export", words=words)
        assert codes == [2, 2]
        assert tree(disk) == {}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with mounted_disk(tmp_path / "disk") as mounted:
        if mounted is None:
            pytest.skip("mounting a tmpfs is not permitted here, and no other disk fills up at a chosen file")
        yield mounted


@pytest.mark.parallel
@pytest.mark.parametrize("limit", ["nr_inodes", "size"])
def test_every_file_of_a_save_in_turn_finds_no_room(limit: str, disk: Disk, rank_pool: RankPool) -> None:
    """Both ranks are told, also of the files that rank 0 alone writes for all, and what was saved is kept.

    Without an inode a file cannot be created, without a page it cannot be written.
    """
    (disk.directory.parent / "tokenizer.json").write_text("{}")
    messages, of_the_other = rank_pool.run(
        "tests.e2e.disk:saves_with_growing_room", world_size=2, directory=disk.directory, limit=limit
    )
    assert messages == of_the_other
    assert all("No space left on device" in message for message in messages)
    if limit == "size":
        assert len(messages) > 10
        return
    names = [re.findall(r"([^/]+)'", message)[-1] for message in messages]
    first = [".write-probe", "common.pt"]
    last = [".metadata.tmp", "metadata.json", "mcore_spec.json", "tokenizer", "tokenizer.json", TRACKER]
    assert names[:2] + names[4:] == first + last
    assert all(name.endswith(".distcp") for name in names[2:4])


@pytest.mark.parallel
@pytest.mark.parametrize(("room", "name"), [(1, "common.pt"), (5, "metadata.json")])
def test_what_rank_zero_writes_alone_stops_every_rank(
    room: int, name: str, base_dir: Path, disk: Disk, rank_pool: RankPool
) -> None:
    words = ["--pretrained-model-path", base_dir, "--export-algorithm", "medusa", "--tensor-model-parallel-size", 2]
    words += ["--save", disk.directory / "checkpoint"]

    def save() -> list[Done]:
        outcomes = rank_pool.run(
            "tests.e2e.rank_cases:outcome",
            world_size=2,
            command="convert",
            words=[str(word) for word in words],
        )
        return [Done(code, "", said) for code, said in outcomes]

    assert [done.code for done in save()] == [0, 0]
    before = tree(disk.directory)
    disk.set_limit("nr_inodes", disk.used("nr_inodes") + room)
    for done in save():
        parts = ("save = ", disk.directory / "checkpoint", f"/{name}'", "free space or choose another directory")
        check_refused(done, *parts, "What was saved before is untouched")
    assert tree(disk.directory) == before
