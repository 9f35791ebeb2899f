"""Presets are found by bare name, files by path, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.errors import ConfigError, nearest
from evomerge.resources import data_root, is_bare_name, locate, preset_names


def test_the_data_root_of_a_clone_is_the_folder_above_the_package() -> None:
    assert data_root() == Path(__file__).resolve().parent.parent
    assert (data_root() / "search_spaces").is_dir()


def test_every_preset_is_found_by_its_bare_name() -> None:
    names = preset_names("search_spaces")
    assert "llm-jp-3-13b-task-arithmetic" in names
    folder = data_root() / "search_spaces"
    assert [locate(name, "search_spaces") for name in names] == [
        folder / f"{name}.yaml" for name in names
    ]


@pytest.mark.parametrize(
    ("reference", "bare"),
    [
        ("elyza-tasks-100", True),
        ("study.yaml", False),
        ("./study", False),
        ("a/b", False),
        ("..", False),
    ],
)
def test_a_suffix_or_a_separator_makes_a_path(reference: str, bare: bool) -> None:
    assert is_bare_name(reference) is bare


def test_a_bare_name_is_never_searched_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_text("study: mine\n")
    (tmp_path / "mine.yaml").write_text("study: mine\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="mine: no study preset"):
        locate("mine", "search_spaces")
    assert locate("mine.yaml", "search_spaces") == Path("mine.yaml")


def test_a_misspelt_preset_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="did you mean llm-jp-3-13b-task-arithmetic"):
        locate("llm-jp-3-13b-task-aritmetic", "search_spaces")


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: this suite file does not exist"):
        locate(str(tmp_path / "nothing.yaml"), "evaluators")


def test_what_is_known_is_not_listed_without_an_end() -> None:
    tasks = [f"task-{number}" for number in range(500)]
    assert nearest("task-7", tasks) == "; did you mean 'task-7'?"
    message = nearest("quite another", tasks)
    assert message.endswith("task-39 and 460 more")
