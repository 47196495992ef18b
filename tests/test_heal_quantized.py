"""Healing of what is quantized: FP8 and integer checkpoints in their own packing, and GGUF files in theirs."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_project, make_tokens, run_main
from family_models import make as make_family
from quantized_models import SCHEMES, packed_copy
from safetensors.torch import load_file, save_file
from test_build import RECIPE as BUILD
from test_heal import lacking
from test_source_packings import FUSED

from reapc.arch import model_spec
from reapc.checkpoint.decode import decode, unpack_stream, unpack_words
from reapc.checkpoint.reader import Checkpoint
from reapc.formats.layout import tensors_of
from reapc.formats.packing import Packing
from reapc.healing import heal_and_judge
from reapc.observe.observe import observe
from reapc.progress import Silent
from reapc.prune.criteria import choose, expert_values
from reapc.prune.heal import heal
from reapc.prune.refit import basis_of
from reapc.prune.rewrite import prune
from reapc.quantize.encode import encode, pack_stream, pack_words
from reapc.quantize.feedback import damped_inverse, nearest, with_feedback
from reapc.quantize.folder_form import FolderForm
from reapc.stream.tokens import write_tokens

TENSOR_FP8 = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
INTEGER_PACKINGS = [
    Packing("ct", 4, 32), Packing("ct", 3, 32), Packing("int8", 8), Packing("auto-round", 2, 32, zero_offset=1),
    Packing("gptq", 4, 32, symmetric=False, zero_offset=1, act_order=True), Packing("gptq", 8, 64),
]  # fmt: skip
ONE_EXPERT = {**SCHEMES, "fp8 per tensor": TENSOR_FP8}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_words_are_what_unpacking_reads(bits: int) -> None:
    values = torch.from_numpy(np.random.default_rng(bits).integers(0, 1 << bits, (5, 96)).astype(np.uint8))
    assert torch.equal(unpack_stream(pack_stream(values, bits), bits, 96), values)
    assert torch.equal(unpack_words(pack_words(values, bits), bits, 96), values)


def random_parts(packing: Packing, rows: int, columns: int) -> dict[str, torch.Tensor]:
    """The parts of a random linear with zero points and scales of its own."""
    random = np.random.default_rng(rows)
    groups, bits = columns // (packing.group_size or columns), packing.bits

    def words(count: int, width: int) -> torch.Tensor:
        return pack_stream(torch.from_numpy(random.integers(0, 1 << bits, (count, width)).astype(np.uint8)), bits)

    scales = torch.from_numpy(random.uniform(0.01, 0.02, (rows, groups))).to(torch.bfloat16)
    if packing.method == "ct":
        return {"weight_packed": words(rows, columns), "weight_scale": scales}
    if packing.method == "int8":
        weight = torch.from_numpy(random.integers(-128, 128, (rows, columns)).astype(np.int8))
        return {"weight": weight, "weight_scale": scales}
    order = torch.from_numpy(random.permutation(np.arange(columns) // packing.group_size).astype(np.int32))
    return {
        "qweight": words(rows, columns).t().contiguous(), "qzeros": words(groups, rows),
        "scales": scales.t().contiguous().half(), **({"g_idx": order} if packing.act_order else {}),
    }  # fmt: skip


@pytest.mark.parametrize("packing", INTEGER_PACKINGS, ids=str)
def test_integers_stay_on_their_grid_and_go_to_the_nearest(packing: Packing) -> None:
    own = random_parts(packing, 64, 128)
    weight = decode(own, packing, 64, 128)
    again = encode(weight, packing, own)
    assert len(again) == 1
    assert all(torch.equal(value, own[key]) for key, value in again.items())
    # half a step off is as far as it gets, where the grid reaches
    scales = own["scales"].float().t() if "scales" in own else own["weight_scale"].float()
    moved = weight + 0.4 * scales.min()
    found = decode({**own, **encode(moved, packing, own)}, packing, 64, 128)
    inside = weight < weight.max(1, keepdim=True).values - 2 * scales.max()
    assert inside.any()
    assert float((found - moved).abs()[inside].max()) <= 0.501 * float(scales.max())


def gram_of(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.double().T @ inputs.double()


def correlated(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Inputs (rows, columns) of which few directions carry most."""
    random = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, columns // 4, generator=random) @ torch.randn(columns // 4, columns, generator=random)
    return mixed + 0.3 * torch.randn(rows, columns, generator=random)


@pytest.mark.parametrize("rows", [600, 40], ids=["more inputs than columns", "fewer"])
def test_error_feedback_is_solving_again_for_the_columns_that_are_left(rows: int) -> None:
    """Against the definition: after each column, least squares over all that are left, in double precision. The
    inverse comes from a basis, in the dual form where inputs are fewer."""
    inputs = correlated(rows, 160)
    gram = gram_of(inputs)
    basis = basis_of(gram, gram, inputs.double() if rows < 160 else None)
    inverse = damped_inverse(basis.values, basis.vectors)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(160)
    assert inverse is not None
    assert float((inverse @ damped - torch.eye(160)).abs().max()) < 1e-6
    weight = torch.randn(24, 160, generator=torch.Generator().manual_seed(1))
    scales, zeros = weight.abs().amax(1, keepdim=True) / 7, torch.tensor(8.0)
    found = with_feedback(weight, scales, zeros, 4, inverse)
    left, levels = weight.double(), torch.empty(24, 160, dtype=torch.uint8)
    order = torch.argsort(inverse.diagonal()).tolist()
    for place, column in enumerate(order):
        own, rest = [column], order[place + 1 :]
        levels[:, own] = nearest(left[:, own].float(), scales, zeros, 4)
        error = left[:, own] - (levels[:, own].double() - zeros) * scales
        if rest:
            left[:, rest] += error @ torch.linalg.solve(damped[rest][:, rest], damped[rest][:, own]).T
    # a level on the edge between two may fall either way in single precision, and carries its column's error on
    assert float((found == levels).float().mean()) > 0.97

    def wrong(levels: torch.Tensor) -> float:
        return float((inputs @ (weight - (levels.float() - zeros) * scales).T).norm())

    assert wrong(found) == pytest.approx(wrong(levels), rel=0.02)
    assert wrong(found) < 0.7 * wrong(nearest(weight, scales, zeros, 4))


@pytest.mark.parametrize("packing", INTEGER_PACKINGS, ids=str)
def test_integers_with_error_feedback_lie_on_the_same_grid_and_lose_less(packing: Packing) -> None:
    own = random_parts(packing, 64, 128)
    weight = decode(own, packing, 64, 128)
    inputs = correlated(500, 128)
    values, vectors = torch.linalg.eigh(gram_of(inputs))
    inverse = damped_inverse(values, vectors)
    again = encode(weight, packing, own, inverse)
    assert all(torch.equal(value, own[key]) for key, value in again.items())  # nothing to feed back
    scales = own["scales"].float().t() if "scales" in own else own["weight_scale"].float()
    steps = torch.rand(64, 128, generator=torch.Generator().manual_seed(2)) - 0.5
    moved = (0.8 * weight if packing.bits > 2 else weight) + steps * scales.min()

    def wrong(inverse: torch.Tensor | None) -> float:
        packed = encode(moved, packing, own, inverse)
        assert {key: (part.dtype, part.shape) for key, part in packed.items()} == {
            key: (own[key].dtype, own[key].shape) for key in packed
        }
        found = decode({**own, **packed}, packing, 64, 128)
        return float((inputs @ (found - moved).T).norm())

    assert wrong(inverse) < (0.85 if packing.bits > 2 else 0.97) * wrong(None)


def test_no_inputs_have_no_feedback() -> None:
    assert damped_inverse(torch.zeros(8), torch.zeros(8, 8)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=str)
def test_fp8_takes_new_scales_in_the_dtype_that_they_had(dtype: torch.dtype) -> None:
    packing = Packing("fp8-block", 8, block=(128, 128))
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 9, 300)
    own = {"weight": torch.zeros(200, 300, dtype=torch.float8_e4m3fn), "weight_scale_inv": torch.ones(2, 3).to(dtype)}
    found = encode(weight, packing, own)
    assert {key: (part.dtype, part.shape) for key, part in found.items()} == {
        key: (part.dtype, part.shape) for key, part in own.items()
    }
    back = decode(found, packing, 200, 300)
    assert float((back - weight).norm() / weight.norm()) < 2**-4


def pruned_by_half(folder: Path, out: Path) -> Path:
    original = Checkpoint(folder)
    scores = observe(original, make_tokens(16, 32, seed=1), out.with_name("w"), Silent(), moments=False)
    half = original.spec.num_experts // 2
    prune(original, choose(scores, "reap", half), out, Silent(), values=expert_values(scores, "reap"))
    return out


def stored_bytes(folder: Path) -> dict[str, bytes]:
    checkpoint = Checkpoint(folder)
    found = {}
    for name, entry in checkpoint.entries.items():
        data = checkpoint.shard_of[name].read_bytes()[entry.start : entry.end]
        found[name] = f"{entry.dtype} {entry.shape} ".encode() + data
    return found


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("fp8-block", {"weight", "weight_scale_inv"}),
        ("fp8", {"weight", "weight_scale"}),
        ("fp8 per tensor", {"weight", "weight_scale"}),
        ("ct-w4g32:experts", {"weight_packed"}),
        ("auto-round-w4g32", {"qweight"}),
    ],
)
def test_a_quantized_checkpoint_leaves_in_its_own_packing(name: str, parts: set[str], tmp_path: Path) -> None:
    """Closer to the original; nothing but the down projections of experts differs, and they are packed as they were."""
    plain = make_model(tmp_path / "plain", dtype=torch.bfloat16, num_experts_per_tok=4, mlp_only_layers=[1])
    folder = packed_copy(plain, tmp_path / "m", deepcopy(ONE_EXPERT[name]))
    if name == "fp8 per tensor":
        tensors = load_file(folder / "model.safetensors")
        tensors = {k: v.reshape(()) if k.endswith("weight_scale") else v for k, v in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    pruned = pruned_by_half(folder, tmp_path / "pruned")
    found = heal_and_judge(
        Checkpoint(folder), pruned, make_tokens(240, 32, seed=2, padded=True), tmp_path / "work",
        tmp_path / "healed", Silent(),
    )  # fmt: skip
    assert found.kept
    assert found.after.kl < 0.95 * found.before.kl
    before, after = stored_bytes(pruned), stored_bytes(tmp_path / "healed")
    assert before.keys() == after.keys()
    changed = {key for key, value in after.items() if before[key] != value}
    assert changed
    assert {key.rpartition(".")[2] for key in changed} <= parts
    assert all(".experts." in key and key.rpartition(".")[0].endswith("down_proj") for key in changed)
    assert (tmp_path / "healed" / "config.json").read_bytes() == (pruned / "config.json").read_bytes()
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("kind", FUSED)
def test_fused_experts_in_fp8(kind: str, tmp_path: Path) -> None:
    """Qwen3-VL's tiles of all experts in one tensor, Llama-4's scale for each column: what is reported of the first
    layer is what the files that were written lack."""
    name, scheme = FUSED[kind]
    (tmp_path / "plain").mkdir()
    make_family(name, tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    spec = model_spec(deepcopy(config))
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    config["quantization_config"] = deepcopy(scheme)
    for tensor, group in tensors_of(spec):
        if group.linears and group.expert_axis is None:
            config["quantization_config"]["modules_to_not_convert"].append(tensor.module)
        elif group.linears:
            experts, rows, columns = tensor.shape
            tiles = torch.ones(-(-rows // 128), -(-columns // 128))
            own = {"weight_scale_inv": tiles} if kind == "tiles" else {"column_scale": torch.ones(1, columns)}
            packing = Packing("fp8-block", 8, block=(128, 128)) if kind == "tiles" else Packing("fp8", 8)
            parts = [encode(tensors[tensor.name][e].float(), packing, own) for e in range(experts)]
            tensors[tensor.name] = torch.stack([part.pop("weight") for part in parts])
            scales = torch.stack([next(iter(part.values())) for part in parts])
            if kind == "columns" and "down" in tensor.name:  # as transformers writes them
                scales = scales.mT.contiguous()
            tensors[f"{tensor.name}_scale{'_inv' if kind == 'tiles' else ''}"] = scales
    (tmp_path / "m").mkdir()
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    original = Checkpoint(tmp_path / "m")
    pruned = Checkpoint(pruned_by_half(tmp_path / "m", tmp_path / "pruned"))
    texts = [make_tokens(count, 32, spec.vocab_size, seed=count) for count in (160, 40)]
    out = tmp_path / "healed"
    first = heal(original, FolderForm(pruned), *texts, tmp_path / "work", out, Silent())[0]
    assert first.kept
    assert lacking(original, pruned, first.layer, texts[1]) == pytest.approx(first.choice[0], rel=1e-3)
    assert lacking(original, Checkpoint(out), first.layer, texts[1]) == pytest.approx(first.choice[1], rel=1e-3)
    before, after = stored_bytes(tmp_path / "pruned"), stored_bytes(out)
    changed = {key.split("experts.")[-1] for key, value in after.items() if before[key] != value}
    assert changed == {"down_proj", "down_proj_scale" + ("_inv" if kind == "tiles" else "")}


VLLM = BUILD.replace('ram = "80MB"', 'name = "rtx4090"').replace("experts = 9", "experts = 8").replace("= 16", "= 56")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    changes = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 32, "num_experts_per_tok": 4}
    return make_project(folder, VLLM, sequences=60, dtype=torch.bfloat16, **changes)


@pytest.mark.parametrize(
    ("fmt", "parts"),
    [
        ("fp8-block:experts", {"weight", "weight_scale_inv"}),
        ("ct-w3g32:experts+layers.1=16", {"weight_packed", "weight"}),
    ],
)
def test_a_build_heals_the_folder_that_it_quantizes(
    fmt: str, parts: set[str], project: Path, cache: str, capsys, tmp_path: Path
) -> None:
    """By AutoRound and by the cast; where a layer stays in 16 bit, its down projections make up for the others."""
    found = {}
    for name, setting in (("plain", "false"), ("healed", "true")):
        options = (f'quantize.format="{fmt}"', "quantize.iters=0", f"quantize.heal={setting}")
        code, _, err = run_main(
            capsys, "build", project / "tiny.toml", *(part for option in options for part in ("--set", option)),
            "--out", tmp_path / name,
        )  # fmt: skip
        assert code == 0, err
        found[name] = json.loads((tmp_path / name / "manifest.json").read_text())
    healing = found["healed"]["healing_quantized"]
    assert healing["healed"]
    assert healing["after"]["kl"] < healing["before"]["kl"]
    assert "quantize" in found["healed"]["reused"]
    folders = [next((tmp_path / name).rglob("config.json")).parent for name in ("plain", "healed")]
    before, after = (stored_bytes(folder) for folder in folders)
    assert before.keys() == after.keys()
    changed = {key for key, value in after.items() if before[key] != value}
    assert all(key.rpartition(".")[0].endswith("down_proj") for key in changed)
    assert {key.rpartition(".")[2] for key in changed} == parts


@pytest.mark.parametrize("name", ["nvfp4:experts"])
def test_a_packing_that_is_not_written_is_refused_by_name(name: str, tmp_path: Path, capsys) -> None:
    plain = make_model(tmp_path / "plain", dtype=torch.bfloat16)
    folder = packed_copy(plain, tmp_path / "m", deepcopy(SCHEMES[name]))
    write_tokens(tmp_path / "tokens", make_tokens(20, 32))
    code, _, err = run_main(
        capsys, "heal", plain, folder, "--tokens", tmp_path / "tokens", "--out", tmp_path / "healed"
    )
    assert (code, "nvfp4 4 bits" in err, "not rounded to" in err) == (1, True, True), err
    assert not (tmp_path / "healed").exists()
