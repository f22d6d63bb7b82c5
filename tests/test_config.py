"""YAML in, validated configuration out; every mistake is one line that names file, key and the closest known key."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest
import yaml

from vlit.config.load import apply_override, load_config, merge, read_yaml
from vlit.errors import ConfigError

BASE = """
    model:
      encoder: {type: hf, path: enc}
      connector: mlp
      llm: {type: hf, path: llm}
    stages:
      align:
        data: [{path: a.json}]
        lr: 1e-3
        global_batch: 4
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(dedent(text), encoding="utf-8")
    return path


def test_defaults_components_by_name_and_scientific_numbers(tmp_path: Path) -> None:
    run = load_config(write(tmp_path, "a.yaml", BASE))
    assert run.stages["align"].lr == 0.001
    assert run.model.connector.type == "mlp"
    assert run.model.connector.depth == 2
    assert run.model.fusion.type == "prefix"
    assert run.data.template.type == "v1"


def test_extends_merges_deeply_and_a_changed_type_replaces_its_keys(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", BASE.replace("connector: mlp", "connector: {type: mlp, depth: 3}"))
    child = write(
        tmp_path,
        "b.yaml",
        """
        extends: a.yaml
        model: {connector: {type: linear}}
        stages: {tune: {data: [{path: b.json}], lr: 2e-5, global_batch: 8}, align: {lr: 5e-4}}
        """,
    )
    run = load_config(child)
    assert list(run.stages) == ["align", "tune"]
    assert (run.stages["align"].lr, run.stages["align"].global_batch) == (5e-4, 4)
    assert run.model.connector.type == "linear"


def test_saved_configuration_is_itself_a_valid_configuration(tmp_path: Path) -> None:
    run = load_config(write(tmp_path, "a.yaml", BASE), ["stages.align.tuning.llm={mode: lora, rank: 8}"])
    saved = tmp_path / "saved.yaml"
    saved.write_text(yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    assert load_config(saved) == run


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BASE.replace("global_batch", "globel_batch"), r'stages.align.globel_batch: unknown key.*"global_batch"'),
        (BASE.replace("connector: mlp", "connector: mpl"), r'connector.type: unknown connector "mpl".*"mlp"'),
        (BASE.replace("connector: mlp", "connector: {type: mlp, dept: 2}"), r'connector.dept: unknown key.*"depth"'),
        (BASE.replace("lr: 1e-3", "lr: -1"), r"stages.align.lr: .*greater than 0 \(got -1\)"),
        (BASE.replace("        lr: 1e-3\n", ""), r"stages.align.lr: this key is required and missing"),
        (BASE + "        lr: 2\n", r'key "lr" is written twice'),
        (BASE.replace("a.json}]", "a.json, share: 0.5}, {path: b.json}]"), r"stages.align.*share and weight do not go"),
        (BASE.replace("a.json}]", "a.json, share: 0.5}, {path: b.json, share: 0.4}]"), r"add up to 0\.9, not to 1"),
        (BASE.replace("a.json}]", "a.json, share: 1.0, weight: 2}]"), r"share and weight do not go together"),
        ("- a\n- b\n", r"expected a mapping of keys at the top level, got list"),
        ("a: [1\n", r"not valid YAML"),
    ],
)
def test_a_mistake_names_file_and_key(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, "broken.yaml", text)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_config(path)
    assert "broken.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistake_in_the_parent_names_the_parent(tmp_path: Path) -> None:
    write(tmp_path, "parent.yaml", BASE.replace("global_batch: 4", "global_batch: many"))
    child = write(tmp_path, "child.yaml", "extends: parent.yaml\nname: x\n")
    with pytest.raises(ConfigError, match=r"parent\.yaml: stages\.align\.global_batch"):
        load_config(child)


def test_a_mistake_in_an_override_names_the_override(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", BASE)
    with pytest.raises(ConfigError, match=r'override "stages.align.tuning.conector=full": .*"connector"'):
        load_config(path, ["stages.align.tuning.conector=full"])
    with pytest.raises(ConfigError, match=r"expected key\.path=value"):
        load_config(path, ["stages.align.lr"])
    with pytest.raises(ConfigError, match=r"stages.align.lr is 0.001, it has no key"):
        load_config(path, ["stages.align.lr.peak=1"])


def test_an_override_with_another_type_replaces_the_component(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", BASE.replace("connector: mlp", "connector: {type: mlp, depth: 3}"))
    assert load_config(path, ["model.connector={type: linear}"]).model.connector.type == "linear"
    assert load_config(path, ["model.connector={activation: silu}"]).model.connector.model_dump() == {
        "type": "mlp",
        "depth": 3,
        "activation": "silu",
    }


def test_overrides_reach_lists_and_make_missing_mappings() -> None:
    data = {"stages": {"align": {"data": [{"path": "a"}, {"path": "b"}]}}}
    apply_override(data, "stages.align.data.1.path=c")
    apply_override(data, "runtime.precision=bf16")
    assert data == {"stages": {"align": {"data": [{"path": "a"}, {"path": "c"}]}}, "runtime": {"precision": "bf16"}}
    with pytest.raises(ConfigError, match=r"list of 2"):
        apply_override(data, "stages.align.data.2.path=c")


def test_a_file_that_extends_itself_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "extends: b.yaml\n")
    with pytest.raises(ConfigError, match=r"extends itself through b\.yaml -> a\.yaml -> b\.yaml"):
        read_yaml(write(tmp_path, "b.yaml", "extends: a.yaml\n"))


def test_a_stage_set_to_null_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", BASE)
    more = "stages.tune={data: [{path: b.json}], lr: 0.1, global_batch: 2}"
    assert list(load_config(path, [more, "stages.align=null"]).stages) == ["tune"]
    with pytest.raises(ConfigError, match="a run needs at least one stage"):
        load_config(path, ["stages.align=null"])


def test_merge_leaves_its_arguments_alone() -> None:
    base = {"a": {"b": 1}, "c": [1]}
    assert merge(base, {"a": {"d": 2}, "c": [2]}) == {"a": {"b": 1, "d": 2}, "c": [2]}
    assert base == {"a": {"b": 1}, "c": [1]}


def test_lora_is_refused_where_it_makes_no_sense(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", BASE)
    with pytest.raises(ConfigError, match=r"connector: mode lora is for vision and llm"):
        load_config(path, ["stages.align.tuning.connector=lora"])
