"""A recipe says what is wrong with it: the file, the key, what was found and the nearest right key."""

from __future__ import annotations

from pathlib import Path

import pytest

from reapc.errors import ReapcError
from reapc.recipe import Recipe, load_recipe
from reapc.target import load_target

MINIMAL = '[model]\nsource = "some/model"\n[target]\nram = "16GB"\n'
FULL = """
[model]
source = "./m"
revision = "v2"
[target]
gpus = 2
vram = "24GiB"
ram = "64GB"
card = "X"
kind = "rocm"
bandwidth = 9e11
compute_capability = "8.6"
[serve]
engine = "vllm"
context = 8192
concurrency = 4
kv_cache = "fp8"
host = "0.0.0.0"
port = 9000
tool_parser = "none"
reasoning_parser = "qwen3"
speculative = "mtp"
[prune]
method = "ean"
ratio = 0.125
max_ratio = 0.5
mtp = "prune"
dissolve_groups = true
heal = true
[quantize]
method = "gptq"
bits = 4
group_size = 128
format = "W4A16"
imatrix = false
heal = true
pre_tokenizer = "qwen2"
[calibration]
data = "text.jsonl"
sequences = 7
tokens = 64
seed = 3
[verify]
data = "held.txt"
sequences = 5
max_kl = 0.1
min_top1 = 0.9
max_perplexity_ratio = 1.05
[output]
path = "result"
"""


def write(folder: Path, text: str | bytes, name: str = "mine.toml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    return load_recipe(write(folder, text), overrides)


def refused(folder: Path, text: str | bytes, *overrides: str) -> str:
    path = write(folder, text)
    with pytest.raises(ReapcError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_defaults(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL)
    assert recipe.model_dump(exclude={"target"}) == {
        "model": {"source": "some/model", "revision": None},
        "serve": {
            "engine": "auto", "context": 4096, "concurrency": 1, "kv_cache": "native", "host": "127.0.0.1",
            "port": 8080, "tensor_parallel": "auto",
            "experimental": (), "tool_parser": "auto", "reasoning_parser": "auto", "speculative": "none",
        },
        "prune": {
            "method": "auto", "ratio": "auto", "experts": "auto", "max_ratio": 0.25, "mtp": "drop",
            "dissolve_groups": False, "heal": False,
        },
        "quantize": {
            "method": "auto", "bits": "auto", "group_size": "auto", "format": "auto", "mixed": {}, "iters": "auto",
            "imatrix": True, "allocate": False, "heal": False, "pre_tokenizer": None,
        },
        "calibration": {"data": "auto", "sequences": 128, "tokens": 512, "seed": 0},
        "verify": {
            "data": "auto", "sequences": 64, "max_kl": None, "min_top1": None, "max_perplexity_ratio": None,
        },
        "output": {"path": ""},
        "name": "mine",
        "base": tmp_path,
    }  # fmt: skip
    assert [(d.name, d.kind, d.capacity_bytes) for d in recipe.target.devices] == [("RAM", "cpu", 16 * 10**9)]


def test_every_key(tmp_path: Path) -> None:
    recipe = load(tmp_path, FULL)
    assert recipe.model.model_dump() == {"source": "./m", "revision": "v2"}
    assert recipe.serve.model_dump() == {
        "engine": "vllm", "context": 8192, "concurrency": 4, "kv_cache": "fp8", "host": "0.0.0.0", "port": 9000,
        "tensor_parallel": "auto", "experimental": (), "tool_parser": "none", "reasoning_parser": "qwen3",
        "speculative": "mtp",
    }  # fmt: skip
    assert recipe.prune.model_dump() == {
        "method": "ean", "ratio": 0.125, "experts": "auto", "max_ratio": 0.5, "mtp": "prune", "dissolve_groups": True,
        "heal": True,
    }  # fmt: skip
    assert recipe.quantize.model_dump() == {
        "method": "gptq", "bits": 4, "group_size": 128, "format": "W4A16", "mixed": {}, "iters": "auto",
        "imatrix": False, "allocate": False, "heal": True, "pre_tokenizer": "qwen2",
    }  # fmt: skip
    assert recipe.calibration.model_dump() == {"data": "text.jsonl", "sequences": 7, "tokens": 64, "seed": 3}
    assert recipe.verify.model_dump() == {
        "data": "held.txt", "sequences": 5, "max_kl": 0.1, "min_top1": 0.9, "max_perplexity_ratio": 1.05,
    }  # fmt: skip
    assert [d.model_dump() for d in recipe.target.devices] == [
        {
            "name": f"X {i}", "kind": "rocm", "capacity_bytes": 24 * 2**30, "bandwidth_bytes_per_second": 9e11,
            "compute_capability": "8.6",
        }
        for i in range(2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "key",
    [
        "serve.engine", "serve.kv_cache", "prune.method", "prune.ratio", "prune.experts", "quantize.method",
        "quantize.bits", "quantize.group_size", "quantize.format", "calibration.data", "verify.data",
    ],
)  # fmt: skip
def test_auto(tmp_path: Path, key: str) -> None:
    section, name = key.split(".")
    recipe = load(tmp_path, MINIMAL + f'[{section}]\n{name} = "auto"\n')
    assert getattr(getattr(recipe, section), name) == "auto"


def test_auto_where_nothing_can_be_decided(tmp_path: Path) -> None:
    assert "serve.context = 'auto'" in refused(tmp_path, MINIMAL + '[serve]\ncontext = "auto"\n')


@pytest.mark.parametrize(
    ("text", "found", "right"),
    [
        ("[prune]\nration = 0.2\n", "prune.ration", "ratio"),
        ("[quantise]\nbits = 4\n", "quantise", "quantize"),
        ("[serve]\ncontxt = 4\n", "serve.contxt", "context"),
        ("[verify]\nmaxkl = 4\n", "verify.maxkl", "max_kl"),
        ("[calibration]\nsequence = 4\n", "calibration.sequence", "sequences"),
        ("[output]\npaht = 'x'\n", "output.paht", "path"),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path: Path, text: str, found: str, right: str) -> None:
    message = refused(tmp_path, MINIMAL + text)
    assert message.startswith(f"{tmp_path / 'mine.toml'}: unknown ")
    assert repr(found) in message
    assert f"did you mean {right!r}?" in message


def test_unknown_key_of_the_target_and_the_model(tmp_path: Path) -> None:
    message = refused(tmp_path, MINIMAL.replace("ram =", "vrma ="))
    assert "'target.vrma'" in message
    assert "did you mean 'vram'?" in message
    message = refused(tmp_path, MINIMAL.replace("source =", "sourc = 'x'\nsource ="))
    assert "'model.sourc'; did you mean 'source'?" in message


def test_unknown_key_with_nothing_near_lists_the_known(tmp_path: Path) -> None:
    message = refused(tmp_path, MINIMAL + "[prune]\nzzzzzz = 1\n")
    assert "did you mean" not in message
    assert "method, ratio, experts, max_ratio" in message


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("serve", "context", '"4096"'), ("serve", "context", "true"), ("serve", "context", "-1"),
        ("serve", "context", "4096.5"), ("serve", "context", "0"), ("serve", "port", "70000"),
        ("serve", "engine", '"ollama"'), ("serve", "engine", "1"), ("serve", "concurrency", "0"),
        ("serve", "kv_cache", '"f32"'), ("serve", "host", "1"),
        ("prune", "ratio", '"0.25"'), ("prune", "ratio", "true"), ("prune", "ratio", "-0.1"), ("prune", "ratio", "1"),
        ("prune", "ratio", "nan"), ("prune", "ratio", "[0.25]"), ("prune", "max_ratio", '"auto"'),
        ("prune", "experts", "true"), ("prune", "experts", "0"), ("prune", "experts", '"12"'),
        ("prune", "experts", "1.5"), ("prune", "method", '"random"'),
        ("quantize", "bits", "true"), ("quantize", "bits", "-4"), ("quantize", "bits", "17"),
        ("quantize", "group_size", '"128"'), ("quantize", "imatrix", "1"), ("quantize", "imatrix", '"yes"'),
        ("quantize", "format", "4"), ("calibration", "tokens", "-8"), ("calibration", "seed", '"0"'),
        ("calibration", "sequences", "false"), ("verify", "max_kl", "true"), ("verify", "max_kl", '"0.1"'),
        ("verify", "max_kl", "-0.1"), ("verify", "min_top1", "true"), ("verify", "min_top1", "1.5"),
        ("verify", "max_perplexity_ratio", "true"), ("verify", "max_perplexity_ratio", "0.9"),
        ("output", "path", "1"),
    ],
)  # fmt: skip
def test_wrong_type_names_file_and_key(tmp_path: Path, section: str, key: str, value: str) -> None:
    message = refused(tmp_path, MINIMAL + f"[{section}]\n{key} = {value}\n")
    for line in message.splitlines():
        assert line.startswith(f"{tmp_path / 'mine.toml'}: {section}.{key} = ")


@pytest.mark.parametrize(("key", "good"), [("prune.ratio", 0), ("verify.max_kl", 1), ("verify.min_top1", 1)])
def test_a_whole_number_is_a_number(tmp_path: Path, key: str, good: int) -> None:
    section, name = key.split(".")
    recipe = load(tmp_path, MINIMAL + f"[{section}]\n{name} = {good}\n")
    assert getattr(getattr(recipe, section), name) == good


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gpus", "true"), ("gpus", "-1"), ("gpus", '"2"'), ("gpus", "1.5"), ("vram", "true"), ("vram", "-5"),
        ("bandwidth", "true"), ("bandwidth", "-1"), ("kind", '"tpu"'), ("compute_capability", '"eight"'),
        ("compute_capability", "8.6"), ("card", "3090"),
    ],
)  # fmt: skip
def test_wrong_type_in_the_target(tmp_path: Path, key: str, value: str) -> None:
    message = refused(tmp_path, MINIMAL + f"{key} = {value}\n")
    assert message.startswith(f"{tmp_path / 'mine.toml'}: target.{key} = ")


def test_a_section_that_is_no_table(tmp_path: Path) -> None:
    assert "mine.toml: prune = 3" in refused(tmp_path, "prune = 3\n" + MINIMAL)
    assert "mine.toml: model = 'x'" in refused(tmp_path, 'model = "x"\n[target]\nram = "1KB"\n')
    assert "target = 7" in refused(tmp_path, 'target = 7\n[model]\nsource = "x/y"\n')


@pytest.mark.parametrize("missing", ["model", "target"])
def test_missing_section(tmp_path: Path, missing: str) -> None:
    text = {"model": '[target]\nram = "1GB"\n', "target": '[model]\nsource = "x/y"\n'}[missing]
    assert f"mine.toml: [{missing}] is missing" in refused(tmp_path, text)


def test_missing_source(tmp_path: Path) -> None:
    assert "model.source" in refused(tmp_path, '[model]\nrevision = "v1"\n[target]\nram = "1GB"\n')
    assert "model.source = ''" in refused(tmp_path, MINIMAL.replace("some/model", ""))


@pytest.mark.parametrize(
    "form", ['target = "{}"\n[model]\nsource = "a/b"\n', '[model]\nsource="a/b"\n[target]\nname = "{}"\n']
)
def test_target_by_name(tmp_path: Path, form: str) -> None:
    assert load(tmp_path, form.format("rtx3090x8")).target.gpus == 8
    message = refused(tmp_path, form.format("rtx3O90x8"))
    assert "unknown target 'rtx3O90x8'" in message
    assert "did you mean 'rtx3090x8'?" in message


def test_target_file_next_to_the_recipe(tmp_path: Path) -> None:
    write(tmp_path, 'ram = "3GB"\n', "box.toml")
    target = load(tmp_path, 'target = "box.toml"\n[model]\nsource = "a/b"\n').target
    assert (target.name, target.ram) == ("box", 3 * 10**9)
    write(tmp_path, "ram = \n", "box.toml")
    assert "box.toml: not valid TOML" in refused(tmp_path, 'target = "box.toml"\n[model]\nsource = "a/b"\n')


def test_target_without_memory(tmp_path: Path) -> None:
    assert "vram is not given" in refused(tmp_path, '[model]\nsource = "a/b"\n[target]\ngpus = 2\n')
    assert "neither gpus and vram nor ram" in refused(tmp_path, '[model]\nsource = "a/b"\n[target]\n')


@pytest.mark.parametrize(
    ("written", "count"),
    [
        ('"24GB"', 24 * 10**9), ('"24GiB"', 24 * 2**30), ('"24gib"', 24 * 2**30), ('"24 GB"', 24 * 10**9),
        ('"24123MiB"', 24123 * 2**20), ('"1.5TB"', 1_500_000_000_000), ('"512B"', 512), ('"7B"', 7),
        ('"3KB"', 3000), ('"3KiB"', 3072),
    ],
)  # fmt: skip
def test_sizes(tmp_path: Path, written: str, count: int) -> None:
    assert load(tmp_path, MINIMAL.replace('"16GB"', written)).target.ram == count


@pytest.mark.parametrize(
    "written", ['"24 gigs"', "24.5", '"1.5"', '"-24GB"', '"GB"', '""', '"24GB extra"', '"1e9"', "true", "-1", "[1]"]
)
def test_bad_sizes(tmp_path: Path, written: str) -> None:
    message = refused(tmp_path, MINIMAL.replace('"16GB"', written))
    assert message.startswith(f"{tmp_path / 'mine.toml'}: target.ram = ")
    assert "size" in message


def test_overrides(tmp_path: Path) -> None:
    recipe = load(
        tmp_path, MINIMAL + "[prune]\nratio = 0.1\n", "prune.ratio=0.2", "serve.context = 512", "target.ram=8GiB",
        "quantize.format=Q8_0", 'prune.method="ean"', "quantize.imatrix=false", "model.source=./here",
        "output.path=a=b",
    )  # fmt: skip
    assert recipe.prune.ratio == 0.2
    assert recipe.serve.context == 512
    assert recipe.target.ram == 8 * 2**30
    assert recipe.quantize.format == "Q8_0"
    assert recipe.prune.method == "ean"
    assert recipe.quantize.imatrix is False
    assert recipe.model.source == "./here"
    assert recipe.output.path == "a=b"


def test_override_of_the_whole_target_and_the_last_one_wins(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL, "target=rtx3090x1").target.gpus == 1
    assert load(tmp_path, MINIMAL, "serve.port=1", "serve.port=2").serve.port == 2


@pytest.mark.parametrize("bad", ["prune.ratio", "=3", "prune.=3", ".ratio=3", "prune..ratio=3", ""])
def test_malformed_override(tmp_path: Path, bad: str) -> None:
    message = refused(tmp_path, MINIMAL, bad)
    assert f"--set {bad!r} is not KEY=VALUE" in message


def test_wrong_override(tmp_path: Path) -> None:
    assert "did you mean 'ratio'?" in refused(tmp_path, MINIMAL, "prune.ration=0.2")
    assert "did you mean 'prune'?" in refused(tmp_path, MINIMAL, "prun.ratio=0.2")
    assert "prune.ratio = 'lots'" in refused(tmp_path, MINIMAL, "prune.ratio=lots")
    assert "'ratio' is not a section" in refused(tmp_path, MINIMAL + "[prune]\nratio = 0.1\n", "prune.ratio.x=1")


def test_a_named_target_with_changes(tmp_path: Path) -> None:
    known = load_target("rtx3090x2")
    changed = known.model_copy(update={"vram": 8 * 10**9})
    named = 'target = "rtx3090x2"\n[model]\nsource = "a/b"\n'
    table = '[model]\nsource = "a/b"\n[target]\nname = "rtx3090x2"\n'
    for text, overrides in ((named, ["target.vram=8GB"]), (table, ["target.vram=8GB"]), (table + 'vram = "8GB"\n', [])):
        target = load(tmp_path, text, *overrides).target
        assert target.model_copy(update={"name": "rtx3090x2"}) == changed
    assert "did you mean 'vram'?" in refused(tmp_path, named, "target.vrma=8GB")
    assert "target.vram = 'lots'" in refused(tmp_path, named, "target.vram=lots")
    assert "did you mean 'rtx3090x2'?" in refused(tmp_path, named.replace("0x2", "Ox2"), "target.ram=8GB")
    write(tmp_path, 'gpus = 3\nvram = "4GB"\n', "box.toml")
    boxed = load(tmp_path, named.replace("rtx3090x2", "box.toml"), "target.vram=8GB").target
    assert (boxed.name, boxed.gpus, boxed.vram) == ("box", 3, 8 * 10**9)
    assert "target.name = ['a']" in refused(tmp_path, MINIMAL + 'name = ["a"]\n')


def test_ratio_and_experts(tmp_path: Path) -> None:
    text = MINIMAL + "[prune]\nratio = 0.25\nexperts = 6\n"
    assert "prune.ratio and prune.experts are both given" in refused(tmp_path, text)
    assert load(tmp_path, text, "prune.ratio=auto").prune.experts == 6
    for asked in ("ratio = 0.25", "experts = 6"):
        assert 'prune.method = "none"' in refused(tmp_path, MINIMAL + f'[prune]\nmethod = "none"\n{asked}\n')
    assert load(tmp_path, MINIMAL + '[prune]\nmethod = "none"\nratio = 0\n').prune.ratio == 0


@pytest.mark.parametrize("method", ["auto", "none", "gguf"])
def test_a_group_size_is_for_vllm_formats(tmp_path: Path, method: str) -> None:
    text = MINIMAL + f'[quantize]\nmethod = "{method}"\ngroup_size = 128\n'
    assert "quantize.group_size = 128" in refused(tmp_path, text)


def test_unreadable_recipes(tmp_path: Path) -> None:
    with pytest.raises(ReapcError, match=r"nosuch\.toml: cannot read the recipe: No such file"):
        load_recipe(tmp_path / "nosuch.toml")
    with pytest.raises(ReapcError, match="cannot read the recipe"):
        load_recipe(tmp_path)
    message = refused(tmp_path, "[model]\nsource = 'a/b'\nrevision =\n")
    assert "mine.toml: not valid TOML" in message
    assert "line 3" in message
    assert "mine.toml: not UTF-8" in refused(tmp_path, b"[model]\nsource = '\xff\xfe'\n")


def test_relative_paths_start_at_the_recipe(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir("/")
    recipe = load(tmp_path, MINIMAL, "output.path=here/out")
    assert recipe.output_path == tmp_path / "here" / "out"
    assert recipe.path("/abs/x") == Path("/abs/x")
    assert recipe.path("~/x") == Path.home() / "x"
    assert load(tmp_path, MINIMAL).output_path == Path("out/mine")
