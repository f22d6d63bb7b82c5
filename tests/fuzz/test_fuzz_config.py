"""Configuration text of any kind: ConfigErrors, or a run whose saved form is the same run."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from tests.fuzz.common import Property, mutated, peak_memory, time_limit
from vlit.config.load import load_config, validate_config
from vlit.config.safe_yaml import parse_yaml
from vlit.config.schema import RunConfig
from vlit.errors import ConfigError

GOOD = """\
name: x
model:
  encoder: {type: hf, path: enc}
  connector: {type: mlp, depth: 2}
  llm: {type: hf, path: llm}
data: &rules {template: {type: v1, system: hi}, max_tokens: 100}
stages:
  align: &stage
    data: [{path: a.json, weight: 2}]
    lr: 1e-3
    global_batch: 4
    tuning: {connector: full}
  tune:
    <<: *stage
    lr: 2e-5
"""
PARTS = (
    b"&a ", b"*a", b"<<: *a", b"<<: [*stage, *stage]", b"!!python/object/apply:os.system [exit]", b"!!python/name:os.system",
    b"!!binary x", b"!!int abc", b"!!timestamp 1", b"2024-99-99", b"0x", b"1_", b".nan", b".inf", b"!!set {a}", b"!!omap [a]",
    b"? ", b"- ", b": ", b"#", b"|\n", b"'", b'"', b"\t", b"\0", b"\xff", b"%YAML 9.9\n---\n", b"---\n", b"...\n",
    b"[" * 500, b"{a: " * 200, b"null", b"~", b"extends: .\n", b"{[1]: 2}",
    b"stages: 3\n", b"plugins: 3\n", b"yes", b"9" * 5000, b"align: null\n",
)  # fmt: skip
scalars = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        3,
        2**70,
        0.5,
        -0.5,
        float("nan"),
        float("inf"),
        "",
        " ",
        "x",
        "full",
        "v1",
        "a.b",
        "\0",
        [],
        [1],
        {},
    ]
)
values = scalars | st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab.", max_size=2), inner, max_size=2)
)


def all_keys(value: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Dotted keys of a configuration written out in full, list items by number."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [prefix] if prefix else []
    for key, held in items:
        found += all_keys(held, (*prefix, str(key)))
    return found


FULL = validate_config(parse_yaml(GOOD, name="good"), name="good").model_dump(mode="json")
FULL["runtime"]["deepspeed"] = None
KEYS = [key for key in all_keys(FULL) if key[0] != "plugins"]  # a plugin is a module that is imported


def check_run(load: Any) -> None:
    run, message = None, ""
    try:
        run = load()
    except ConfigError as error:
        message = str(error)
    if run is None:
        assert message.strip()
        assert all(len(line) < 3000 for line in message.split("\n"))
        return
    assert isinstance(run, RunConfig)
    saved = run.model_dump(mode="json")
    again = validate_config(json.loads(json.dumps(saved)), name="again")
    assert again.model_dump(mode="json") == saved


def check_text(content: bytes) -> None:
    if b"plugins" in content and b"plugins: 3" not in content:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        path.write_bytes(content)
        check_run(lambda: load_config(path))


def check_value(case: tuple[tuple[str, ...], Any]) -> None:
    keys, value = case
    data = json.loads(json.dumps(FULL))
    node: Any = data
    for key in keys[:-1]:
        node = node[int(key) if isinstance(node, list) else key]
    node[int(keys[-1]) if isinstance(node, list) else keys[-1]] = value
    check_run(lambda: validate_config(data, name="c.yaml"))


def check_override(case: tuple[tuple[str, ...], str, str]) -> None:
    keys, more, value = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        path.write_text(GOOD, encoding="utf-8")
        check_run(lambda: load_config(path, [f"{'.'.join(keys)}{more}={value}"]))


any_text = st.text(st.sampled_from("ab:-{}[]&*!<?|>'\"#,. \n\t1é\x85"), max_size=40).map(str.encode)
overrides = st.tuples(
    st.sampled_from(KEYS),
    st.sampled_from(("", ".x", ".0", ".-1", ".")),
    values.map(json.dumps) | st.text(max_size=8),
)
PROPERTIES = [
    Property("config: damaged text", mutated(st.just(GOOD.encode()), tokens=PARTS), check_text, 250),
    Property("config: any text", any_text, check_text, 150),
    Property("config: wrong values under every key", st.tuples(st.sampled_from(KEYS), values), check_value, 400),
    Property("config: overrides", overrides, check_override, 150),
]


@pytest.mark.parametrize("fuzz", PROPERTIES, ids=lambda fuzz: fuzz.name)
def test_config(fuzz: Property):
    before = peak_memory()
    assert fuzz.run() > fuzz.examples // 2
    assert peak_memory() - before < 300 << 20


def test_every_key_takes_a_wrong_value_as_an_error_or_as_it_is():
    """One value of each kind under each key, without drawing."""
    assert len(KEYS) > 100
    for key in KEYS:
        for value in (None, True, -1, 0.5, "x", [], ["x"], {}, {"x": 1}, "\0", 2**70):
            check_value((key, value))


def laughs(line: str) -> str:
    """Thirteen lines, each naming the one before nine times: 9 ** 13 values when written out."""
    pairs = zip("abcdefghijklm", "bcdefghijklmn", strict=True)
    return "".join(line.format(name=name, before=", ".join([f"*{before}"] * 9)) + "\n" for before, name in pairs)


LAUGHS = "a: &a [x, x]\n" + laughs("{name}: &{name} [{before}]")
MERGED = "a: &a {x: 1}\n" + laughs("{name}: &{name} {{<<: [{before}]}}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "values with its aliases"),
        (MERGED, "values with its aliases"),
        ("a: &a [*a]", "self-reference"),
        ("a: &a {b: *a}", "self-reference"),
        ("[" * 60_000, "nested too deeply|not valid YAML"),
        ("a: " + "{a: " * 100 + "1" + "}" * 100, "nested deeper than 64"),
        ("{[1]: 2}", "a key is a list or a mapping"),
        ("a: !!python/object/apply:os.system [exit 3]", "could not determine a constructor"),
        ("a: 2024-99-99", "not valid YAML"),
        ("a: !!int abc", "not valid YAML"),
        ("a: 1\n---\nb: 2", "expected a single document"),
    ],
    ids=range(11),
)
def test_hostile_yaml_is_one_configuration_error_within_seconds_and_little_memory(text: str, words: str):
    before = peak_memory()
    with time_limit(10), pytest.raises(ConfigError, match=words):
        parse_yaml(text, name="c.yaml")
    assert peak_memory() - before < 200 << 20


def test_ordinary_anchors_and_merges_still_work():
    assert (
        parse_yaml(GOOD, name="g")["stages"]["tune"]["global_batch"]
        == yaml.safe_load(GOOD)["stages"]["tune"]["global_batch"]
        == 4
    )
