"""What must hold of every plan, over the whole catalogue: hypothesis looks for a counterexample."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import combinations, pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from specs import demo_spec

from reapc.arch import ModelSpec, known
from reapc.engines import llamacpp, vllm
from reapc.engines.split import fill
from reapc.errors import ReapcError
from reapc.formats import weights
from reapc.plan import Candidate
from reapc.planner import prior
from reapc.planner.fit import Wish, question_of, verdict
from reapc.planner.question import GGUF_AUTO, VLLM_AUTO
from reapc.planner.search import candidate, layouts_of, legal, rank, search
from reapc.recipe import ServeSection
from reapc.target import Target

GIB = 2**30
SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
MODELS = st.sampled_from(known.names())
SIZES = st.integers(2, 200).map(lambda n: n * GIB)
CONTEXTS = st.sampled_from([512, 2048, 4096, 8192, 32768, 100_000])
CAPABILITIES = st.sampled_from([None, "7.5", "8.0", "8.6", "8.9", "9.0", "12.0"])


@lru_cache(maxsize=64)
def spec_of(name: str) -> ModelSpec:
    return known.spec(name)


def cards(gpus: int, vram: int, ram: int = 0, capability: str | None = "9.0") -> Target:
    return Target(gpus=gpus, vram=vram, ram=ram, compute_capability=capability, bandwidth=1e12)


def best(name: str, target: Target, context: int = 4096, ratio: float = 0.25, engine: str = "auto") -> Candidate | None:
    spec = spec_of(name)
    serve = ServeSection.model_validate({"context": min(context, spec.max_context), "engine": engine})
    found = verdict(name, spec, Wish(target, serve, max_ratio=ratio), nearest=False)
    return found.best


def not_worse(smaller: Candidate | None, larger: Candidate | None) -> bool:
    return smaller is None or (larger is not None and larger.predicted_loss <= smaller.predicted_loss)


@SETTINGS
@given(MODELS, SIZES, st.integers(0, 40), st.sampled_from([1, 2, 3, 4, 8]), CAPABILITIES)
def test_more_memory_per_card_is_never_worse(name: str, vram: int, more: int, gpus: int, capability: str) -> None:
    less = best(name, cards(gpus, vram, 0, capability))
    assert not_worse(less, best(name, cards(gpus, vram + more * GIB // 8, 0, capability)))


@SETTINGS
@given(MODELS, SIZES, st.sampled_from([1, 2, 3, 4, 7]), st.integers(1, 4))
def test_more_cards_are_never_worse(name: str, vram: int, gpus: int, more: int) -> None:
    assert not_worse(best(name, cards(gpus, vram)), best(name, cards(gpus + more, vram)))


@SETTINGS
@given(MODELS, SIZES, st.integers(0, 512), st.integers(0, 256))
def test_more_ram_is_never_worse_and_a_card_never_hurts(name: str, vram: int, ram: int, more: int) -> None:
    small = best(name, cards(1, vram, ram * GIB))
    large = best(name, cards(1, vram, (ram + more) * GIB))
    assert not_worse(small, large)
    if ram:
        assert not_worse(best(name, Target(ram=ram * GIB)), small)


@SETTINGS
@given(MODELS, SIZES, st.sampled_from([1, 2, 8]), CONTEXTS, CONTEXTS)
def test_more_context_never_frees_memory(name: str, vram: int, gpus: int, one: int, other: int) -> None:
    short, long = sorted((one, other))
    target = cards(gpus, vram)
    assert not_worse(best(name, target, long), best(name, target, short))
    spec = spec_of(name)
    short, long = min(short, spec.max_context), min(long, spec.max_context)
    for engine, fmt in (("llama.cpp", "Q4_K_M"), ("vllm", "bf16")):
        used = []
        for context in (short, long):
            question = question_of(name, spec, Wish(target, ServeSection(context=context)))
            kv = "f16" if engine == "llama.cpp" else "auto"
            if legal(question, engine, fmt, kv):
                return
            sizes = layouts_of(question, engine, fmt, kv)
            if isinstance(sizes, vllm.Layouts):
                if not sizes.legal:
                    return
                layout = sizes.legal[0][0]
                used.append([d.used_bytes for d in sizes._placement(layout, spec.num_experts, False).devices])
            else:
                used.append([sum(sizes.kv_bytes) + sum(sizes.state_bytes), *sizes._workspaces([], gpus, 0)])
        assert all(a <= b for a, b in zip(*used, strict=True))


def check_legal(name: str, item: Candidate, target: Target) -> None:
    """The legality rules once more, written from facts/ and not from the planner."""
    spec, place = spec_of(name), item.placement
    assert spec.top_k <= item.experts_kept <= spec.num_experts
    assert item.experts_kept % spec.n_group == 0
    if item.engine == "llama.cpp":
        assert spec.gguf_arch is not None
        assert item.format in GGUF_AUTO or item.format == "MXFP4_MOE"
        assert sum(place.layers_per_device) == spec.num_layers
        return
    fmt = weights.parse(item.format)
    assert fmt is not None
    tp, pp, ep = place.tensor_parallel, place.pipeline_parallel, place.expert_parallel
    assert target.gpus >= tp * pp
    assert ep in (1, tp)
    assert spec.num_heads % tp == 0
    assert sum(place.layers_per_device) == spec.num_layers
    if not spec.latent_attention and spec.family not in ("nemotron_h", "deepseek_v4"):
        assert spec.num_kv_heads % tp == 0 or tp % spec.num_kv_heads == 0
    width = spec.expert_intermediate_size // (1 if ep > 1 else tp)
    assert ep > 1 or spec.expert_intermediate_size % tp == 0
    if fmt.method == "gptq":
        assert fmt.bits in (4, 8)
    if fmt.method in ("gptq", "ct", "auto-round"):
        assert width % 32 == 0
        if fmt.bits not in (4, 8):
            assert width % fmt.group_size == 0
        if width % fmt.group_size:
            assert any("slow" in note for note in place.notes)
    capability = tuple(map(int, (target.compute_capability or "8.0").split(".")))
    if spec.sparse_attention:
        assert capability >= (9, 0)
    assert capability >= ((8, 0) if fmt.name == "bf16" else (7, 0))
    assert item.kv_dtype == "auto" or capability >= (8, 9)


@settings(SETTINGS, max_examples=150)
@given(
    MODELS, SIZES, st.sampled_from([1, 2, 3, 4, 6, 8]), st.sampled_from([0, 32, 256]), CONTEXTS, CAPABILITIES,
    st.sampled_from(["auto", "vllm", "llama.cpp"]), st.sampled_from([0.0, 0.25, 0.6]),
)  # fmt: skip
def test_nothing_illegal_is_proposed_and_every_device_adds_up(
    name: str, vram: int, gpus: int, ram: int, context: int, capability: str | None, engine: str, ratio: float
) -> None:
    target = cards(gpus, vram, ram * GIB, capability)
    item = best(name, target, context, ratio, engine)
    if item is None:
        return
    check_legal(name, item, target)
    assert item.prune_ratio <= ratio + 1e-9
    devices = item.placement.devices
    assert len([d for d in devices if d.name != "host"]) == gpus
    for d in devices:
        parts = d.weights_bytes + d.kv_bytes + d.state_bytes + d.workspace_bytes + d.overhead_bytes
        assert parts + d.free_bytes == d.capacity_bytes
        assert d.free_bytes >= 0
        assert min(d.weights_bytes, d.kv_bytes, d.state_bytes, d.workspace_bytes, d.overhead_bytes) >= 0
    assert sum(d.kv_bytes for d in devices) == item.kv_bytes
    if item.engine == "llama.cpp" and not spec_of(name).tied_embeddings:
        assert sum(d.weights_bytes for d in devices) == item.weights_bytes
    if item.engine == "vllm":
        assert sum(d.weights_bytes for d in devices) >= item.weights_bytes


SPLITS = st.lists(st.integers(1, 50), min_size=4, max_size=8)


@settings(SETTINGS, max_examples=100)
@given(SPLITS, st.integers(2, 4), st.integers(0, 40))
def test_layer_split_equals_brute_force(costs: list[int], parts: int, last: int) -> None:
    def worst(cuts: tuple[int, ...]) -> int:
        edges = (0, *cuts, len(costs))
        sums = [sum(costs[a:b]) for a, b in pairwise(edges)]
        sums[-1] += last
        return max(sums)

    least = min(worst(cuts) for cuts in combinations(range(1, len(costs)), parts - 1))
    counts = llamacpp.split_layers(costs, parts, last)
    edges = [sum(counts[:i]) for i in range(1, parts)]
    assert worst(tuple(edges)) == least
    assert fill(costs, parts, 0, last, least) is not None
    assert fill(costs, parts, 0, last, least - 1) is None


@pytest.mark.parametrize("gpus", [0, 1, 2])
@pytest.mark.parametrize("kib", range(51_000, 62_000, 1_900))
def test_the_search_equals_brute_force_on_a_small_space(gpus: int, kib: int) -> None:
    """Every format, every count, every layout, sized one by one."""
    spec = demo_spec(num_experts=16)
    target = Target(gpus=gpus, vram=(kib - 30_000) * 1024 + GIB) if gpus else Target(ram=kib * 1024)
    wish = Wish(target, ServeSection(context=2048), max_ratio=0.6)
    question = question_of("demo", spec, wish)
    least = None
    for engine, fmt in [*(("llama.cpp", name) for name in GGUF_AUTO), *(("vllm", name) for name in VLLM_AUTO)]:
        kv = "f16" if engine == "llama.cpp" else "auto"
        if legal(question, engine, fmt, kv):
            continue
        sizes = layouts_of(question, engine, fmt, kv)
        if isinstance(sizes, vllm.Layouts) and not sizes.legal:
            continue
        for kept in question.counts:
            item = candidate(question, engine, fmt, kv, sizes, kept)
            if item.fits and (least is None or item.predicted_loss < least):
                least = item.predicted_loss
    for exhaustive in (True, False):
        found = rank(search(question, exhaustive=exhaustive).fitting)
        assert (found[0].predicted_loss if found else None) == least


def test_brute_force_saw_both_ends() -> None:
    """The parameters above reach from "nothing fits" to "nothing is lost"."""
    losses = []
    for kib in range(51_000, 62_000, 1_900):
        wish = Wish(Target(ram=kib * 1024), ServeSection(context=2048))
        question = question_of("demo", demo_spec(num_experts=16), wish)
        losses.append([c.predicted_loss for c in rank(search(question).fitting)[:1]])
    assert losses[0] != losses[-1]


def test_only_an_explicit_request_prunes_to_the_mixtral_count() -> None:
    spec = demo_spec(num_experts=16)
    wish = Wish(Target(ram=GIB), ServeSection(), max_ratio=0.6)
    assert 8 not in question_of("demo", spec, wish).counts
    assert question_of("demo", spec, replace(wish, experts=8)).counts == (8,)
    with pytest.raises(ReapcError, match="every token is sent to 4"):
        question_of("demo", spec, replace(wish, experts=3))


def test_the_fused_router_only_breaks_ties() -> None:
    assert 0 < prior.router_cost(127, "llama.cpp", "cuda") < prior.pruning_loss(1 / 64)
    assert prior.router_cost(128, "llama.cpp", "cuda") == prior.router_cost(127, "vllm", "cuda") == 0
