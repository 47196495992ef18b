"""Calibration corpora: packing to exact budgets, held-out samples, recipes, presets and the command line."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, make_model, run_main
from corpora_fixtures import (
    TOOL,
    VOCABULARY,
    WEATHER,
    pack,
    rows_of,
    sample_text,
    source_of,
    texts,
    write,
)
from hypothesis import given
from hypothesis import strategies as st

from reapc.errors import ReapcError
from reapc.mix import Mix, MixSource, parse_sources, read_mix
from reapc.observe.corpora import presets
from reapc.observe.corpora.pack import LEAST_TOKENS, budgets, split_exactly, tokens_by_domain
from reapc.observe.corpus import load_data, load_split
from reapc.recipe import make_recipe
from reapc.stream.tokens import Tokens, read_tokens

pytest_plugins = ["corpora_fixtures"]


# Budgets and packing


@given(st.integers(0, 10**9), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9))
def test_a_budget_is_shared_exactly(total: int, weights: list[float]) -> None:
    parts = split_exactly(total, weights)
    assert sum(parts) == total
    assert all(abs(part - total * w / sum(weights)) < 1 + 1e-6 * total for part, w in zip(parts, weights, strict=True))


def test_domains_come_first_then_their_sources() -> None:
    mix = Mix(
        "m", tuple(MixSource(source=s, weight=w, domain=d) for s, w, d in (("a", 1, "x"), ("b", 1, "x"), ("c", 1, "y")))
    )
    parts = budgets(mix, 100)
    assert sum(parts) == 100
    assert parts[0] + parts[1] == 67  # round(2/3 x 100)


def test_rows_hold_one_sample_each_and_the_budget_is_exact(
    chat_model: Path, chat_tokenizer: Any, tmp_path: Path
) -> None:
    code, chat = write(tmp_path / "code.jsonl", texts("code", 40)), write(tmp_path / "chat.jsonl", texts("chat", 40))
    tokens, rest = pack(
        chat_model, [source_of(code, weight=0.7, domain="code"), source_of(chat, weight=0.3, domain="chat")], 64, 50
    )
    assert rest is None
    assert tokens.count == 50 * 64
    assert tokens_by_domain(tokens) == {"code": 2240, "chat": 960}
    whole = {
        "code": [chat_tokenizer(row["text"])["input_ids"] for row in texts("code", 40)],
        "chat": [chat_tokenizer(row["text"])["input_ids"] for row in texts("chat", 40)],
    }
    cut = 0
    for row, domain in zip(rows_of(tokens), tokens.domain, strict=True):
        # every row is a stretch of a sample that starts at a multiple of the row's length
        of = [
            ids
            for ids in whole[tokens.domains[domain]]
            if any(ids[i : i + len(row)] == row for i in range(0, len(ids), 64))
        ]
        assert len(of) == 1
        at = next(i for i in range(0, len(of[0]), 64) if of[0][i : i + len(row)] == row)
        cut += len(row) < min(64, len(of[0]) - at)
    assert cut <= 2  # the last sample of each domain, to hit its budget
    assert not np.any(tokens.input_ids[~tokens.mask])
    assert all(mask[: mask.sum()].all() for mask in tokens.mask)  # padded at the end only


def test_padding_is_next_to_nothing_and_rows_dealt_in_turn_are_alike(chat_model: Path, tmp_path: Path) -> None:
    short, long = (
        write(tmp_path / "s.jsonl", texts("short", 400, 5)),
        write(tmp_path / "l.jsonl", texts("long", 400, 150)),
    )
    sources = [source_of(short, domain="short"), source_of(long, domain="long")]
    tokens, _ = pack(chat_model, sources, 512, 120)
    computed = sum(batch.tokens for batch in tokens.batches(4096))
    assert computed < 1.1 * tokens.count
    shuffled = tokens.take(np.random.default_rng(0).permutation(tokens.sequences))
    assert sum(batch.tokens for batch in shuffled.batches(4096)) > 1.3 * tokens.count
    for domain in range(2):  # as the parts of the scores are dealt
        counts = tokens.mask[tokens.domain == domain].sum(axis=1)
        assert abs(counts[::2].sum() - counts[1::2].sum()) < 0.05 * counts.sum()


def test_a_sample_longer_than_a_row_becomes_consecutive_rows(
    chat_model: Path, chat_tokenizer: Any, tmp_path: Path
) -> None:
    text = sample_text("long", 1, 200)
    (tmp_path / "a.txt").write_text(text)
    ids = chat_tokenizer(text)["input_ids"]
    assert len(ids) > 5 * 64 + LEAST_TOKENS
    reports: list[Any] = []
    tokens, _ = pack(chat_model, [source_of(tmp_path / "a.txt")], 64, 5, reports=reports)
    assert sorted(rows_of(tokens)) == sorted(ids[i : i + 64] for i in range(0, 320, 64))
    assert (reports[0].cut, reports[0].samples, reports[0].rows, reports[0].tokens) == (1, 1, 5, 320)


def test_what_is_left_out_is_counted(chat_model: Path, tmp_path: Path) -> None:
    same = {"text": sample_text("twice", 0, 40)}
    path = write(tmp_path / "a.jsonl", [{"text": "short"}, same, same, *texts("more", 5)])
    reports: list[Any] = []
    pack(chat_model, [source_of(path, repeat=True)], 64, 40, reports=reports)
    assert reports[0].skipped == {"fewer than 8 tokens": 1, "the same as another sample": 1}
    assert "1 left out: fewer than 8 tokens" in reports[0].line()
    assert reports[0].repeated


def test_the_seed_decides_and_nothing_else(chat_model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", texts("a", 60))
    sources = parse_sources([source_of(path)], "data")
    digests = [load_data(chat_model, sources, Path("."), 64, 20, seed, VOCABULARY).digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


# Held-out text


def markers(tokens: Tokens, chat_tokenizer: Any) -> Counter[str]:
    """Kind and number of the samples that the rows are of: every word of a sample names it by its sequence."""
    found: Counter[str] = Counter()
    for row in rows_of(tokens):
        found[chat_tokenizer.decode(row).split(" says:")[0]] += 1
    return found


def test_held_out_samples_are_others_in_the_same_mix(chat_model: Path, chat_tokenizer: Any, tmp_path: Path) -> None:
    code, chat = (
        write(tmp_path / "code.jsonl", texts("code", 90, 20)),
        write(tmp_path / "chat.jsonl", texts("chat", 90, 20)),
    )
    write(
        tmp_path / "code.jsonl", [*texts("code", 90, 20), *texts("code", 30, 20)]
    )  # with samples that are there twice
    sources = [source_of(code, weight=3, domain="code"), source_of(chat, weight=1, domain="chat")]
    tokens, held_out = pack(chat_model, sources, 1024, 3, 1)
    assert held_out is not None
    assert tokens_by_domain(tokens) == {"code": 2304, "chat": 768}
    assert tokens_by_domain(held_out) == {"code": 768, "chat": 256}
    ours, theirs = markers(tokens, chat_tokenizer), markers(held_out, chat_tokenizer)
    assert ours
    assert theirs
    assert all(" number " in name for name in [*ours, *theirs])
    assert not set(ours) & set(theirs)


def test_a_path_alone_gives_what_it_has(chat_model: Path, chat_tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", texts("a", 12))
    said: list[str] = []

    class Log:
        def log(self, line: str) -> None:
            said.append(line)

        def task(self, *_: object) -> Any:
            from reapc.progress import Silent

            return Silent().task("", 1, "")

    tokens, held_out = load_split(chat_model, str(path), Path("."), 1024, 100, 50, 0, VOCABULARY, progress=Log())
    assert held_out is not None
    everything = sum(len(chat_tokenizer(row["text"])["input_ids"]) for row in texts("a", 12))
    assert tokens.count + held_out.count == everything
    assert 0 < held_out.count <= everything // 3
    assert not set(markers(tokens, chat_tokenizer)) & set(markers(held_out, chat_tokenizer))
    assert any(f"{tokens.count} tokens of the" in line and "are all that a.jsonl has" in line for line in said)
    one = write(tmp_path / "one.jsonl", texts("a", 1))
    with pytest.raises(ReapcError, match="one sample: none is left to verify with"):
        load_split(chat_model, str(one), Path("."), 64, 10, 5, 0, VOCABULARY)


def test_a_build_splits_a_mix_by_domain(chat_model: Path, tmp_path: Path) -> None:
    from reapc.arch import load_config, model_spec
    from reapc.build import _split
    from reapc.progress import Silent

    write(tmp_path / "code.jsonl", texts("code", 60))
    write(tmp_path / "chat.jsonl", texts("chat", 60))
    data = [
        {"source": "code.jsonl", "weight": 0.5, "domain": "code"},
        {"source": "chat.jsonl", "weight": 0.5, "domain": "chat"},
    ]
    settings = {"data": data, "sequences": 20, "tokens": 128}
    sections: dict[str, Any] = {"model": {"source": str(chat_model)}, "target": {"ram": "4GB"}, "calibration": settings}
    recipe = make_recipe({**sections, "verify": {"sequences": 4}}, tmp_path / "r.toml")
    spec = model_spec(load_config(chat_model))
    tokens, held_out = _split(recipe, chat_model, spec, Silent())
    assert tokens_by_domain(tokens) == {"code": 1280, "chat": 1280}
    assert tokens_by_domain(held_out) == {"code": 256, "chat": 256}
    own = make_recipe({**sections, "verify": {"data": "code.jsonl", "sequences": 4}}, tmp_path / "r.toml")
    assert _split(own, chat_model, spec, Silent())[1].count == 512
    same = {**sections, "calibration": {"data": "code.jsonl"}, "verify": {"data": "code.jsonl"}}
    with pytest.raises(ReapcError, match=r"verify.data = 'code.jsonl' is calibration.data"):
        _split(make_recipe(same, tmp_path / "r.toml"), chat_model, spec, Silent())
    long = {**sections, "calibration": {**settings, "tokens": 1024}}
    with pytest.raises(ReapcError, match=r"sequences of 1024 tokens .* the model's context is 512"):
        _split(make_recipe(long, tmp_path / "r.toml"), chat_model, spec, Silent())


# What is wrong is named


def error_of(chat_model: Path, sources: list[dict[str, Any]], length: int = 64, limit: int = 4) -> str:
    with pytest.raises(ReapcError) as error:
        pack(chat_model, sources, length, limit)
    return str(error.value)


def test_bad_records_are_named_by_file_and_line(chat_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n{"text": \n')
    assert f"{path}:3: not JSON" in error_of(chat_model, [source_of(path)])
    path.write_text("[1, 2]\n")
    assert f"{path}:1: an object is expected, not list" in error_of(chat_model, [source_of(path)])
    write(path, [{"body_text": "x", "id": 3}])
    message = error_of(chat_model, [source_of(path)])
    assert f"{path}:1: no 'messages'" in message
    assert "the fields there are: body_text, id" in message
    message = error_of(chat_model, [source_of(path, format="text", field="content")])
    assert f"{path}:1: the field 'content' is missing; the fields there are: body_text, id" in message
    write(path, [{"messages": [{"content": "no role"}]}])
    assert f"{path}:1: a message without a role" in error_of(chat_model, [source_of(path)])
    write(path, [{"messages": "hello"}])
    assert f"{path}:1: a list of messages is expected" in error_of(chat_model, [source_of(path)])


def test_too_few_tokens_and_empty_domains(chat_model: Path, tmp_path: Path) -> None:
    few, empty = write(tmp_path / "few.jsonl", texts("few", 2)), write(tmp_path / "empty.jsonl", [{"text": "x"}])
    enough = write(tmp_path / "enough.jsonl", texts("enough", 60))
    message = error_of(chat_model, [source_of(few, domain="d")], limit=100)
    reports: list[Any] = []
    pack(chat_model, [source_of(few, repeat=True)], 64, 100, reports=reports)
    assert f"{few} (domain 'd') has " in message
    assert "its share of the budget is 6400" in message
    assert "repeat = true" in message
    assert (reports[0].tokens, reports[0].repeated) == (6400, True)
    message = error_of(chat_model, [source_of(enough, domain="a"), source_of(empty, domain="nothing")])
    assert "the domain 'nothing' is empty" in message
    assert "1 left out: fewer than 8 tokens" in message
    assert "weight 1e-06 is less than one of 256 tokens" in error_of(
        chat_model, [source_of(enough, domain="a"), source_of(few, domain="b", weight=1e-6)]
    )
    pack(chat_model, [source_of(enough, limit=3, repeat=True)], 64, 100, reports=reports)
    assert reports[1].samples == 3
    assert "no such file or folder" in error_of(chat_model, [{"source": "nosuch.jsonl"}])
    (tmp_path / "folder").mkdir()
    assert "no text in this folder" in error_of(chat_model, [source_of(tmp_path / "folder")])


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"weight": 1}, "data[1]: source = {'weight': 1}: Field required"),
        ({"source": "a", "wieght": 1}, "unknown key 'wieght'; did you mean 'weight'?"),
        ({"source": "a", "weight": 0}, "data[1]: weight = 0: Input should be greater than 0"),
        ({"source": "a", "weight": float("nan")}, "data[1]: weight = nan"),
        ({"source": "a", "weight": True}, "data[1]: weight = True"),
        ({"source": "a", "domain": "a=b"}, "data[1]: domain = 'a=b'"),
        ({"source": "a", "format": "chats"}, "data[1]: format = 'chats'"),
        ({"source": "a", "fields": {"text": "t"}}, "fields need a format"),
        (
            {"source": "a", "format": "text", "fields": {"messages": "t"}},
            "fields has 'messages'; format 'text' has text",
        ),
        ({"source": "a", "format": "chat", "field": "m", "fields": {"tools": "t"}}, "field and fields are both given"),
        ({"source": "a", "format": "chat", "tools": "{}"}, "not a list of objects"),
        ({"source": "a", "format": "text", "tools": "[]"}, "tools are for"),
        ("text.jsonl", "data[1] = 'text.jsonl': a table"),
    ],
)
def test_sources_are_strict(entry: Any, words: str) -> None:
    with pytest.raises(ReapcError) as error:
        parse_sources([entry], "data")
    assert words in str(error.value)


def test_a_recipe_takes_a_list_of_sources(tmp_path: Path) -> None:
    data: dict[str, Any] = {"model": {"source": "m"}, "target": {"ram": "4GB"}}
    mix = [{"source": "a.jsonl", "weight": 0.4, "domain": "code"}, {"source": "b", "weight": 2}]
    recipe = make_recipe({**data, "calibration": {"data": mix}}, tmp_path / "r.toml")
    assert [(s.source, s.weight, s.domain) for s in recipe.calibration.data if isinstance(s, MixSource)] == [
        ("a.jsonl", 0.4, "code"), ("b", 2, "all"),
    ]  # fmt: skip
    json.dumps(recipe.model_dump(mode="json"))  # what a build's key is made of
    with pytest.raises(ReapcError, match=r"r.toml: calibration.data\[2\]: weight = -1: Input should be greater than 0"):
        make_recipe({**data, "calibration": {"data": [mix[0], {"source": "b", "weight": -1}]}}, tmp_path / "r.toml")
    with pytest.raises(ReapcError, match=r"r.toml: calibration.data = \[\]: a list of tables"):
        make_recipe({**data, "calibration": {"data": []}}, tmp_path / "r.toml")
    with pytest.raises(ReapcError, match=r"r.toml: calibration.data = 5: a list of tables"):
        make_recipe({**data, "calibration": {"data": 5}}, tmp_path / "r.toml")


def test_data_means_a_path_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    preset = presets.resolve("code", Path("."))
    assert isinstance(preset, Mix)
    assert preset.name == "preset:code"
    (tmp_path / "code").mkdir()
    folder = presets.resolve("code", Path("."))
    assert isinstance(folder, Mix)
    assert (folder.at_most, folder.sources[0].source) == (True, "code")
    assert presets.resolve("preset:code", Path(".")) == preset
    assert presets.resolve("auto", Path(".")) is None
    hub = presets.resolve("some-org/some-data", Path("."))
    assert isinstance(hub, Mix)
    with pytest.raises(ReapcError, match=r"no such file or folder[\s\S]*presets?: agentic, chat, code"):
        presets.resolve("codde", Path("."))
    with pytest.raises(ReapcError, match="did you mean 'code'"):
        presets.resolve("preset:codde", Path("."))


# Presets

NAMES = ("agentic", "chat", "code", "general", "math", "reap-release", "tools")


def test_presets_are_the_ones_that_are_promised() -> None:
    assert presets.names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_presets_are_whole(name: str) -> None:
    mix = presets.preset(name)
    text = presets.path_of(name).read_text()
    assert text.startswith("# ")
    assert f"--data {name}" in text.split("description")[0]
    assert mix.description
    for source in mix.sources:
        assert source.source.startswith("hub:")
        assert source.licence
        assert source.why
        assert source.format != "auto"
        assert source.revision is not None
        assert len(source.revision) == 40
        assert not source.problem()
    assert sum(mix.shares().values()) == pytest.approx(1)
    assert sum(budgets(mix, 65536)) == 65536


def test_the_published_mix_is_the_readmes() -> None:
    """github.com/CerebrasResearch/reap, README: 4096 samples of each of the six."""
    mix = presets.preset("reap-release")
    assert sorted((s.name.removeprefix("hub:"), s.weight) for s in mix.sources) == [
        ("SWE-bench/SWE-smith-trajectories(tool)", 1), ("Salesforce/xlam-function-calling-60k", 1),
        ("open-r1/Mixture-of-Thoughts[code]", 1), ("open-r1/Mixture-of-Thoughts[math]", 1),
        ("open-r1/Mixture-of-Thoughts[science]", 1), ("theblackcat102/evol-codealpaca-v1", 1),
    ]  # fmt: skip


def test_the_table_of_the_documentation_is_the_presets() -> None:
    section = (ROOT / "docs" / "calibration.md").read_text().split("## Presets")[1]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    wanted = []
    for name in NAMES:
        mix = presets.preset(name)
        whole = sum(source.weight for source in mix.sources)
        for source in mix.sources:
            share = f"{source.weight / whole:.0%}"
            hub = source.name.removeprefix("hub:")
            wanted.append(f"| `{name}` | {source.domain} | {share} | {hub} | {source.format} | {source.licence} |")
    assert rows == wanted


# The command line


def test_the_list_and_one_preset(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_main(capsys, "corpora")
    assert code == 0
    assert all(name in out for name in NAMES)
    code, out, _ = run_main(capsys, "corpora", "--json")
    found = json.loads(out)["presets"]
    assert [preset["name"] for preset in found] == list(NAMES)
    assert all(source["licence"] for preset in found for source in preset["sources"])
    code, out, _ = run_main(capsys, "corpora", "math")
    assert out == presets.path_of("math").read_text()
    assert json.loads(run_main(capsys, "corpora", "math", "--json")[1]) == found[4]
    code, _, err = run_main(capsys, "corpora", "mathe")
    assert code == 2
    assert "did you mean 'math'?" in err


def test_packing_gives_what_observing_reads(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "code.jsonl", texts("code", 60))
    (tmp_path / "prose").mkdir()
    (tmp_path / "prose" / "a.txt").write_text(sample_text("prose", 1, 900))
    mix = tmp_path / "mix.toml"
    mix.write_text(
        '[[data]]\nsource = "code.jsonl"\nweight = 0.75\ndomain = "code"\n'
        '[[data]]\nsource = "prose"\nweight = 0.25\ndomain = "prose"\n'
    )
    assert read_mix(mix).domains == ("code", "prose")
    out = tmp_path / "t.safetensors"
    arguments = ["corpora", "pack", mix, "--model", chat_model, "--sequences", 20, "--length", 128, "--out", out]
    code, printed, err = run_main(capsys, *arguments)
    assert code == 0, err
    assert f"{out}: 2560 tokens in" in printed
    assert "(code 1920, prose 640)" in printed
    assert "1 samples longer than a row" in err
    tokens = read_tokens(out, VOCABULARY)
    assert tokens.digest == load_data(chat_model, str(mix), Path("."), 128, 20, 0, VOCABULARY).digest
    assert "exists already" in run_main(capsys, *arguments)[2]
    assert "--held-out" in run_main(capsys, *arguments[:-1], tmp_path / "x.safetensors", "--held-out", 3)[2]
    assert "ends in .safetensors" in run_main(capsys, *arguments[:-1], tmp_path / "x.bin")[2]


def test_observing_a_mix_keeps_its_domains(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from reapc.observe.scores import load_scores

    folder = make_model(tmp_path / "m", num_hidden_layers=1, vocab_size=VOCABULARY, mlp_only_layers=[])
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(chat_model / name, folder / name)
    write(tmp_path / "a.jsonl", texts("a", 40))
    write(tmp_path / "b.jsonl", [{"messages": WEATHER, "tools": [TOOL]}])
    mix = tmp_path / "mix.toml"
    mix.write_text(
        '[[data]]\nsource = "a.jsonl"\nweight = 9\ndomain = "text"\n'
        '[[data]]\nsource = "b.jsonl"\nweight = 1\ndomain = "tools"\n'
    )
    out = tmp_path / "s.safetensors"
    code, printed, err = run_main(
        capsys, "observe", folder, "--data", mix, "--sequences", 5, "--length", 128, "--out", out, "--json"
    )
    assert code == 0, err
    assert json.loads(printed)["tokens"] == 640
    scores = load_scores(out)
    assert sum(scores.layer(0)["routed_tokens"]) == 640 * 3
    code, _, err = run_main(capsys, "observe", folder, "--data", mix, "--length", 1024, "--out", tmp_path / "x")
    assert code == 2
    assert "the model's context is 512" in err


def test_a_rehearsal_does_not_download_a_mix(tmp_path: Path) -> None:
    from reapc.rehearse.recipe import _local_text

    data: dict[str, Any] = {"model": {"source": "m"}, "target": {"ram": "4GB"}}
    path = write(tmp_path / "a.jsonl", texts("a", 3))
    for named, text in (
        ("code", None),
        ("auto", None),
        ("x.safetensors", None),
        ("a.jsonl", path),
        ([{"source": "a.jsonl"}], None),
    ):
        recipe = make_recipe({**data, "calibration": {"data": named}}, tmp_path / "r.toml")
        assert _local_text(recipe) == text
