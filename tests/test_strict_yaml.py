"""YAML is read with every key once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from evomerge import strict_yaml
from evomerge.errors import ConfigError
from evomerge.evaluate.suite import read_suite_config
from evomerge.recipe import read_recipe
from evomerge.search.study import read_study
from evomerge.strict_yaml import load_yaml


def test_yaml_is_read_as_plain_values() -> None:
    text = "a: [1, 2.5, null, true]\nb: {a: x, c: {a: y}}\nd: [{a: 1}, {a: 2}]\n"
    assert load_yaml(text) == {
        "a": [1, 2.5, None, True],
        "b": {"a": "x", "c": {"a": "y"}},
        "d": [{"a": 1}, {"a": 2}],
    }


def test_a_mapping_may_take_over_and_change_the_keys_of_others() -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b {x: 3}\nc: {<<: *a, <<: *b, y: 4}\n"
    assert load_yaml(text)["c"] == yaml.safe_load(text)["c"]


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("models: [a]\ndtype: float32\nmodels: [b]\n", "models", "1 and 3"),
        ("a:\n  b:\n    - weight: 1\n      weight: 2\n", "weight", "3 and 4"),
        ("a: {x: 1, 'x': 1}\n", "x", "1 and 1"),
    ],
)
def test_a_key_that_is_there_twice_is_refused(text: str, key: str, lines: str) -> None:
    with pytest.raises(yaml.YAMLError, match=f"the key '{key}' is there twice, in lines {lines};"):
        load_yaml(text)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.getcwd []", "!!python/name:os.getcwd"])
def test_yaml_makes_no_objects(tag: str) -> None:
    with pytest.raises(yaml.YAMLError, match="could not determine a constructor"):
        load_yaml(f"a: {tag}\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: !!bool maybe", "'maybe' is no valid bool"),
        ("a: !!int x", "'x' is no valid int"),
        ("a: 2001-99-99", "'2001-99-99' is no valid timestamp"),
        ("a: !!timestamp x", "'x' is no valid timestamp"),
        ("a: " + "9" * 5000, "99… is no valid int"),
        ('a: "\\ud800"', "is no valid str"),
        ("a: " + "[" * 100_000, "nested more than 64 deep, in line 1"),
        ("a: " + "{a: " * 65 + "1" + "}" * 65, "nested more than 64 deep, in line 1"),
        ("- " * 2000, "nested more than 64 deep"),
        ("a: &a [1, *a]", "nested more than 64 deep"),
        (
            "\n".join(
                ["a0: &a0 [x]", *(f"a{n}: &a{n} [{f'*a{n - 1},' * 9}]" for n in range(1, 12))]
            ),
            r"its aliases \(\*name\) stand for more than 100000 values, in line 6",
        ),
    ],
)
def test_what_cannot_be_read_or_held_is_said(text: str, said: str) -> None:
    with pytest.raises(yaml.YAMLError, match=said):
        load_yaml(text)


def test_a_large_file_without_aliases_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_yaml, "_MOST_VALUES", 10)
    assert load_yaml(f"[{'1, ' * 100}1]") == [1] * 101


@pytest.mark.parametrize(
    "read", [read_recipe, read_suite_config, lambda path: read_study(str(path))]
)
def test_every_file_of_a_user_names_its_repeated_key(read: object, tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("models: [a]\nmodels: [b]\n")
    assert callable(read)
    with pytest.raises(ConfigError, match=r"twice\.yaml: .*the key 'models' is there twice"):
        read(file)
