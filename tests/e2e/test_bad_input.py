"""What users get wrong: one line that names field, value and remedy, exit code 2, and nothing written.

Most cases run the command inside this process, where an unexpected error would be raised by the test itself
instead of printed as a traceback.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mcore_spec.cli.main import run_command
from tests.e2e.conftest import VOCAB_SIZE, Done, Run, check_refused, make_base, subprocess_environment, tree
from tests.pool import RankPool

pytestmark = pytest.mark.e2e
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def save(tmp_path: Path) -> Path:
    """Where to save; a case that is refused leaves its parent empty."""
    (tmp_path / "writable").mkdir()
    return tmp_path / "writable" / "new" / "checkpoint"


@pytest.fixture
def refuse(run: Run, base_dir: Path, save: Path) -> Callable[..., None]:
    """Convert with further words, and check what it says and that nothing was written."""

    def call(*words: object, says: tuple[object, ...], base: object = base_dir, algorithm: str = "eagle") -> None:
        done = run("convert", "--pretrained-model-path", base, "--export-algorithm", algorithm, "--save", save, *words)
        check_refused(done, *says)
        assert list(save.parents[1].iterdir()) == []

    return call


@pytest.fixture(scope="module")
def checkpoints(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base as a checkpoint, and with a draft."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in ("none", "eagle"):
        words = ["--pretrained-model-path", str(base_dir), "--export-algorithm", name, "--save", str(root / name)]
        assert run_command("convert", words) == 0
    return {name: root / name for name in ("none", "eagle")}


# --- the base -------------------------------------------------------------------------------------


def changed_base(base_dir: Path, directory: Path, **config: object) -> Path:
    """A copy of the base with other values in its configuration."""
    shutil.copytree(base_dir, directory)
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return directory


def test_missing_safetensors(refuse, base_dir: Path, tmp_path: Path) -> None:
    base = changed_base(base_dir, tmp_path / "base")
    (base / "model.safetensors").unlink()
    refuse(base=base, says=(base, "model.safetensors", "save_pretrained"))


def test_a_missing_shard(refuse, base_dir: Path, tmp_path: Path) -> None:
    base = changed_base(base_dir, tmp_path / "base")
    (base / "model.safetensors").rename(base / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refuse(
        base=base, says=("model.safetensors.index.json", "model-00002-of-00002.safetensors", "complete the download")
    )


@pytest.mark.parametrize("length", [0, 5, 100, -1, -4000])
def test_truncated_safetensors(length: int, refuse, base_dir: Path, tmp_path: Path) -> None:
    base = changed_base(base_dir, tmp_path / "base")
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    refuse(base=base, says=(file, "download"))


def test_no_such_directory(refuse, tmp_path: Path) -> None:
    missing = tmp_path / "no" / "such"
    refuse(base=missing, says=(f"pretrained_model_path = '{missing}'", "no local directory", "give its directory"))


@pytest.mark.parametrize("network", ["offline mode", "no network"])
def test_a_wrong_hub_id_offline(network: str, base_dir: Path, save: Path, tmp_path: Path) -> None:
    """In a process of its own, because the hub's settings are read at import; it must not wait for a network.

    Without a network: nothing listens at the hub's address, as a firewall that refuses would have it.
    """
    environment = {**subprocess_environment(), "HF_HOME": str(tmp_path / "hub")}
    if network == "no network":
        environment = {name: value for name, value in environment.items() if "proxy" not in name.lower()}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    words = [
        "--pretrained-model-path",
        "no-such-user/no-such-model",
        "--export-algorithm",
        "eagle",
        "--save",
        str(save),
    ]
    command = [sys.executable, "examples/convert_model.py", *words]
    start = time.monotonic()
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
    assert time.monotonic() - start < 60
    check_refused(
        Done(done.returncode, done.stdout, done.stderr),
        "pretrained_model_path = 'no-such-user/no-such-model'",
        "check the name",
        "give its directory",
    )
    assert list(save.parents[1].iterdir()) == []


def test_an_unsupported_architecture(refuse, base_dir: Path, tmp_path: Path) -> None:
    base = changed_base(base_dir, tmp_path / "base", architectures=["GPT2LMHeadModel"], model_type="gpt2")
    refuse(base=base, says=(base / "config.json", "architectures = 'GPT2LMHeadModel'", "supported: LlamaForCausalLM"))


def test_another_dtype_than_the_configuration_says(refuse, base_dir: Path, tmp_path: Path) -> None:
    base = changed_base(base_dir, tmp_path / "base", dtype="bfloat16", torch_dtype="bfloat16")
    refuse(base=base, says=("torch.float32", "torch.bfloat16", "params_dtype"))


def test_weights_of_another_shape(refuse, base_dir: Path, tmp_path: Path) -> None:
    base = changed_base(base_dir, tmp_path / "base", intermediate_size=64)
    refuse(base=base, says=(base, "mlp.gate_proj.weight", "config.json"))


# --- the draft ------------------------------------------------------------------------------------


def eagle_file(tmp_path: Path, values: object) -> Path:
    file = tmp_path / "eagle.json"
    file.write_text(values if isinstance(values, str) else json.dumps(values))
    return file


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_hidden_layer": 2}, ("num_hidden_layer: unknown field", "did you mean num_hidden_layers?")),
        (
            {"eagle_ttt_steps": 3, "eagle_architecture_config": {"rope_tetha": 1.0}},
            ("eagle_architecture_config.rope_tetha: unknown field", "did you mean rope_theta?"),
        ),
        (
            {"eagle_ttt_step": 3, "eagle_architecture_config": {}},
            ("eagle_ttt_step: unknown field", "did you mean eagle_ttt_steps?"),
        ),
        ({"eagle_ttt_step": 3}, ("eagle_ttt_step: unknown field", "did you mean eagle_ttt_steps?")),
        ({"num_hidden_layers": "two"}, ("num_hidden_layers = 'two'", "valid integer")),
        ([1, 2], ("list", "must hold an object")),
        ("{not json", ("is not JSON",)),
        ({"use_mtp_layernorm": True, "use_aux_hidden_state": False}, ("eagle-mtp", "--export-eagle-algorithm")),
    ],
)
def test_a_wrong_draft_configuration(values, says, refuse, tmp_path: Path) -> None:
    file = eagle_file(tmp_path, values)
    refuse("--eagle-config", file, says=(f"eagle_config = {file}", *says))


def test_a_missing_draft_configuration(refuse, tmp_path: Path) -> None:
    missing = tmp_path / "missing.json"
    refuse("--eagle-config", missing, says=(f"eagle_config = {missing}", "no such file"))


@pytest.mark.parametrize("layers", [[1, 8], [-1, 3]])
def test_an_aux_layer_out_of_range(layers, refuse, tmp_path: Path) -> None:
    file = eagle_file(tmp_path, {"eagle_aux_hidden_state_layer_ids": layers})
    wrong = [layer for layer in layers if not 0 <= layer < 8]
    says = (f"eagle_aux_hidden_state_layer_ids = {layers}", f"{wrong} out of range", "layers 0 to 7")
    refuse("--eagle-config", file, says=says)


def test_unsorted_aux_layers(refuse, tmp_path: Path) -> None:
    file = eagle_file(tmp_path, {"eagle_aux_hidden_state_layer_ids": [3, 1]})
    refuse("--eagle-config", file, says=("eagle_aux_hidden_state_layer_ids = [3, 1]", "must be sorted"))


def test_a_draft_vocabulary_larger_than_the_base(refuse, tmp_path: Path) -> None:
    file = eagle_file(tmp_path, {"draft_vocab_size": 104})
    refuse("--eagle-config", file, says=("draft_vocab_size = 104", "vocabulary of 103", "choose at most that"))
    d2t = tmp_path / "d2t.pt"
    torch.save(torch.zeros(104, dtype=torch.int64), d2t)
    refuse("--draft-vocab-cache", d2t, says=(f"draft_vocab_cache = {d2t}", "104 entries", "103", "make it again"))


def test_a_draft_vocabulary_without_mapping(refuse, tmp_path: Path) -> None:
    file = eagle_file(tmp_path, {"draft_vocab_size": 40})
    refuse("--eagle-config", file, says=("draft_vocab_size = 40", "103", "--draft-vocab-cache"))


def test_a_mapping_of_another_size(refuse, tmp_path: Path) -> None:
    file, d2t = eagle_file(tmp_path, {"draft_vocab_size": 40}), tmp_path / "d2t.pt"
    torch.save(torch.zeros(39, dtype=torch.int64), d2t)
    says = ("draft_vocab_size = 40", "39 entries", "make the two agree")
    refuse("--eagle-config", file, "--draft-vocab-cache", d2t, says=says)


def _truncated(file: Path) -> None:
    torch.save(torch.zeros(40, dtype=torch.int64), file)
    file.write_bytes(file.read_bytes()[:-200])


D2T_DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda file: None, "no such file"),
    "empty": (lambda file: file.touch(), "not a torch tensor file"),
    "text": (lambda file: file.write_text("0 0 0\n"), "not a torch tensor file"),
    "truncated": (_truncated, "not a torch tensor file"),
    "a dict": (lambda file: torch.save({"d2t": torch.zeros(3)}, file), "dict"),
    "code": (lambda file: torch.save(make_base, file), "not a torch tensor file"),
    "floats": (lambda file: torch.save(torch.zeros(40), file), "torch.float32"),
    "matrix": (lambda file: torch.save(torch.zeros(4, 4, dtype=torch.int64), file), "(4, 4)"),
    "no entry": (lambda file: torch.save(torch.zeros(0, dtype=torch.int64), file), "ascend strictly"),
    "descending": (lambda file: torch.save(torch.tensor([9, 3, 1]), file), "ascend strictly"),
    "out of range": (lambda file: torch.save(torch.tensor([0, VOCAB_SIZE]), file), "another base"),
    "negative": (lambda file: torch.save(torch.tensor([-1, 0]), file), "another base"),
}


@pytest.mark.parametrize("damage", D2T_DAMAGES)
def test_a_damaged_d2t(damage: str, refuse, tmp_path: Path) -> None:
    d2t = tmp_path / "d2t.pt"
    make, says = D2T_DAMAGES[damage]
    make(d2t)
    refuse("--draft-vocab-cache", d2t, says=(f"draft_vocab_cache = {d2t}", says, "make it again"))


# --- the layout -----------------------------------------------------------------------------------


def test_a_world_size_that_is_not_divisible(refuse) -> None:
    says = ("world size 1", "tensor_model_parallel_size = 2", "pipeline_model_parallel_size = 1", "nproc_per_node=2")
    refuse("--tensor-model-parallel-size", 2, says=says)


@pytest.mark.parallel
@pytest.mark.parametrize("whose", ["draft", "base", "draft's groups", "width", "layers"])
def test_what_the_layout_does_not_divide(
    whose: str, rank_pool: RankPool, base_dir: Path, save: Path, tmp_path: Path
) -> None:
    base, size, extra = base_dir, "tensor", {}
    if whose == "base":
        base = make_base(tmp_path / "base", num_attention_heads=1, num_key_value_heads=1)
        says = ("tensor_model_parallel_size = 2", "num_attention_heads = 1", "choose a size that divides it")
    elif whose == "layers":
        base, size = make_base(tmp_path / "base", num_hidden_layers=3), "pipeline"
        says = ("pipeline_model_parallel_size = 2", "3 decoder layers", "decoder_last_pipeline_num_layers")
    else:
        extra = {
            "draft": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8},
            "draft's groups": {"num_attention_heads": 2, "num_key_value_heads": 1},
            "width": {"intermediate_size": 33},
        }[whose]
        field = {"draft": "num_attention_heads = 3", "draft's groups": "num_key_value_heads = 1"}.get(
            whose, "intermediate_size = 33"
        )
        says = (f"{field} is not divisible by tensor_model_parallel_size = 2", "choose a size that divides")
    words = ["--pretrained-model-path", base, "--export-algorithm", "eagle", "--save", save]
    words += [f"--{size}-model-parallel-size", "2", "--eagle-config", eagle_file(tmp_path, extra)]
    outcomes = rank_pool.run(
        "tests.e2e.rank_cases:outcome", world_size=2, command="convert", words=[str(word) for word in words]
    )
    for code, said in outcomes:
        check_refused(Done(code, "", said), *says)
    assert list(save.parents[1].iterdir()) == []


# --- checkpoints ----------------------------------------------------------------------------------


def test_saving_over_a_checkpoint_of_another_base(run: Run, checkpoints, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", seed=1)
    target = tmp_path / "checkpoint"
    shutil.copytree(checkpoints["none"], target)
    before = tree(target)
    done = run("convert", "--pretrained-model-path", other, "--export-algorithm", "eagle", "--save", target)
    check_refused(done, f"save = {target}", "another base", other, "Choose another directory")
    assert tree(target) == before


def test_a_checkpoint_directory_without_tracker(run: Run, save: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    load = ("--load", tmp_path / "empty")
    says = (f"load = {tmp_path / 'empty'}", "latest_checkpointed_iteration.txt", "that was saved to")
    check_refused(run("convert", *load, "--export-algorithm", "eagle", "--save", save), *says)
    check_refused(run("export", *load, "--export-dir", save), *says)
    assert list(save.parents[1].iterdir()) == []


def test_an_iteration_that_is_not_there(run: Run, checkpoints, save: Path) -> None:
    done = run("export", "--load", checkpoints["eagle"], "--ckpt-step", 7, "--export-dir", save)
    check_refused(done, "iter_0000007", "ckpt_step")
    assert list(save.parents[1].iterdir()) == []


@pytest.mark.parametrize("damage", ["truncated weights", "missing weights", "record", "tracker", "metadata"])
def test_a_damaged_checkpoint(damage: str, run: Run, checkpoints, save: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(checkpoints["eagle"], checkpoint)
    iteration = checkpoint / "iter_0000001"
    (weights,) = iteration.glob("*.distcp")
    if damage == "truncated weights":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif damage == "missing weights":
        weights.unlink()
    elif damage == "record":
        (iteration / "mcore_spec.json").write_text("{")
    elif damage == "metadata":
        (iteration / ".metadata").write_bytes(b"nothing")
    else:
        (checkpoint / "latest_checkpointed_iteration.txt").write_text("soon")
    done = run("export", "--load", checkpoint, "--export-dir", save)
    check_refused(done, checkpoint)
    assert list(save.parents[1].iterdir()) == []


def test_converting_what_has_a_draft(run: Run, checkpoints, save: Path) -> None:
    done = run("convert", "--load", checkpoints["eagle"], "--export-algorithm", "medusa", "--save", save)
    check_refused(done, f"load = {checkpoints['eagle']}", "draft already (eagle)", "convert the base")
    assert list(save.parents[1].iterdir()) == []


def test_exporting_a_draft_that_is_not_there(run: Run, checkpoints, save: Path) -> None:
    done = run("export", "--load", checkpoints["none"], "--export-dir", save, "--export-extra-modules")
    check_refused(done, f"load = {checkpoints['none']}", "no draft", "convert it first", "--export-extra-modules")
    assert list(save.parents[1].iterdir()) == []


def test_the_speculators_form_of_what_it_does_not_know(run: Run, base_dir: Path, save: Path, tmp_path: Path) -> None:
    words = ("--pretrained-model-path", base_dir, "--export-algorithm", "medusa", "--save", tmp_path / "medusa")
    assert run("convert", *words).code == 0
    export = ("export", "--load", tmp_path / "medusa", "--export-dir", save, "--export-format", "speculators")
    check_refused(run(*export, "--export-extra-modules"), "export_format = 'speculators'", "Medusa", "choose hf")
    assert list(save.parents[1].iterdir()) == []


# --- the place to write to ------------------------------------------------------------------------

_CAP_DAC_OVERRIDE = 1
_LINUX_CAPABILITY_VERSION_3 = 0x20080522


@contextmanager
def without_override() -> Iterator[None]:
    """Root's right to write where permissions forbid it is laid down for a while; others have none."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_LINUX_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # (effective, permitted, inheritable), lower 32 capabilities first
    assert libc.capget(header, sets) == 0, os.strerror(ctypes.get_errno())
    effective = sets[0]
    sets[0] = effective & ~(1 << _CAP_DAC_OVERRIDE)
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        sets[0] = effective
        assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


@pytest.fixture
def forbidden(tmp_path: Path) -> Iterator[Path]:
    """A directory that may be read and not written to."""
    directory = tmp_path / "forbidden"
    directory.mkdir(mode=0o555)
    with without_override():
        with pytest.raises(PermissionError):
            (directory / "probe").touch()
        yield directory
    directory.chmod(0o755)


@pytest.mark.parametrize("below", ["", "new"])
def test_no_permission_to_write(below: str, run: Run, base_dir: Path, checkpoints, forbidden: Path) -> None:
    target = forbidden / below
    words = ("--pretrained-model-path", base_dir, "--export-algorithm", "eagle", "--save", target)
    check_refused(run("convert", *words), "Permission denied", forbidden, "choose another --save")
    export = ("export", "--load", checkpoints["eagle"], "--export-extra-modules", "--export-dir", forbidden / "export")
    check_refused(run(*export), "Permission denied", forbidden, "choose another --export-dir")
    assert list(forbidden.iterdir()) == []


def test_a_file_in_the_way(run: Run, base_dir: Path, checkpoints, tmp_path: Path) -> None:
    """Not even root can write below it."""
    file = tmp_path / "file"
    file.write_text("mine")
    for target in (file, file / "below"):
        words = ("--pretrained-model-path", base_dir, "--export-algorithm", "eagle", "--save", target)
        check_refused(run("convert", *words), file, "choose another --save")
        done = run("export", "--load", checkpoints["eagle"], "--export-dir", target)
        check_refused(done, file, "choose another")
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("architecture", [None, ["a"], 3])
def test_an_architecture_that_is_no_object(architecture: object, refuse: Callable[..., None], tmp_path: Path) -> None:
    file = tmp_path / "eagle.json"
    file.write_text(json.dumps({"eagle_architecture_config": architecture}))
    refuse("--eagle-config", file, says=(f"eagle_config = {file}", "must be an object", "leave it out"))


def test_a_form_of_a_draft_that_is_not_there(run: Run, base_dir: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    words = ("--pretrained-model-path", base_dir, "--export-algorithm", "none", "--save", plain)
    assert run("convert", *words).code == 0
    done = run("export", "--load", plain, "--export-dir", tmp_path / "out", "--export-format", "speculators")
    check_refused(done, f"load = {plain} has no draft", "--export-format")
    assert not (tmp_path / "out").exists()


def test_the_current_directory_is_no_earlier_export(
    run: Run, base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--pretrained-model-path", base_dir, "--export-algorithm", "medusa", "--save", tmp_path / "checkpoint")
    assert run("convert", *words).code == 0
    here = tmp_path / "here"
    here.mkdir()
    (here / "notes.txt").write_text("mine")
    monkeypatch.chdir(here)
    done = run("export", "--load", tmp_path / "checkpoint", "--export-dir", ".", "--overwrite")
    check_refused(done, f"export_dir = {here}", "is not an earlier export")
    assert (here / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("script", ["tools/quickstart.sh", "tools/test.sh"])
def test_the_scripts_refuse_what_they_do_not_know(script: str) -> None:
    done = subprocess.run(
        ["bash", script, "--wrok-dir", "x"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert f"usage: {script}" in done.stderr
