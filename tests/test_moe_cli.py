"""`evomerge moe` and its preset, as a user types them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from evomerge.errors import ConfigError
from evomerge.resources import locate, preset_names
from tests import tiny
from tests.test_cli import Ran, run, tree

CONFIG = {
    "base_model": "base",
    "gate_mode": "cheap_embed",
    "experts": [
        {"source_model": "base", "positive_prompts": ["sums"]},
        {"source_model": "expert", "positive_prompts": ["songs"]},
    ],
}
PRESET = "elyza-moe-2x13b"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny.llama(tmp_path / "base", layers=2, dtype=torch.float32)
    tiny.variant(tmp_path / "base", tmp_path / "expert", seed=1)
    (tmp_path / "moe.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_path_goes_to_stdout_and_the_rest_to_stderr(here: Path) -> None:
    ran = run("moe", "moe.yaml", "out", "--max-shard-size", "400KB")
    assert ran.status == 0
    assert ran.out == "out\n"
    assert "making gates from the prompts of 2 experts" in ran.err
    assert len(list((here / "out").glob("model-*.safetensors"))) > 2
    assert (here / "out" / "mergekit_moe_config.yml").read_text() == yaml.safe_dump(CONFIG)


def test_a_folder_that_is_there_is_replaced_only_when_asked(here: Path) -> None:
    assert run("moe", "moe.yaml", "out").status == 0
    refused = run("moe", "moe.yaml", "out")
    assert refused.status == 2
    assert "--overwrite" in refused.err
    assert run("moe", "moe.yaml", "out", "--overwrite").status == 0


def test_a_mixture_never_replaces_a_model_that_an_adapter_is_applied_to(here: Path) -> None:
    assert run("extract-lora", "expert", "base", "lora", "--rank", "2").status == 0
    experts = [{"source_model": "base+lora"}, {"source_model": "expert"}]
    config = {"base_model": "expert", "gate_mode": "random", "experts": experts}
    (here / "moe.yaml").write_text(yaml.safe_dump(config))
    ran = run("moe", "moe.yaml", "base", "--overwrite")
    assert ran.status == 2
    assert "base, which goes into the merge" in ran.err
    assert (here / "base" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gate_mod": "random"}, ["moe.yaml", "gate_mod", "did you mean 'gate_mode'"]),
        ({"base_model": "nowhere"}, ["moe.yaml", "nowhere", "neither a folder"]),
        ({"tokenizer_source": "nowhere"}, ["moe.yaml", "nowhere", "neither a folder"]),
        ({"architecture": "qwen3"}, ["moe.yaml", "qwen3 moe", "base is llama"]),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing(
    changes: dict[str, object], words: list[str], here: Path
) -> None:
    (here / "moe.yaml").write_text(yaml.safe_dump(CONFIG | changes))
    before = tree(here)
    ran = run("moe", "moe.yaml", "out")
    assert ran.status == 2
    assert all(word in ran.err for word in words), ran.err
    assert "Traceback" not in ran.err
    assert tree(here) == before


def test_lenient_goes_on_with_a_warning(here: Path) -> None:
    (here / "moe.yaml").write_text(yaml.safe_dump(CONFIG | {"gate_mod": "random"}))
    ran = run("moe", "moe.yaml", "out", "--lenient")
    assert ran.status == 0
    assert "warning: unknown key gate_mod is ignored" in ran.err


def test_the_preset_is_listed_as_a_mixture_shown_and_copied(here: Path) -> None:
    lines = run("presets", "list").out.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith(PRESET)] == [[PRESET, "mixture"]]
    shown = run("presets", "show", PRESET).out
    assert yaml.safe_load(shown)["gate_mode"] == "random"
    assert run("presets", "copy", PRESET) == Ran(0, f"{PRESET}.yaml\n", "")
    assert Path(f"{PRESET}.yaml").read_text() == shown


def test_a_bare_name_is_a_preset_of_a_mixture_and_no_other(here: Path) -> None:
    assert locate(PRESET, "mixtures").name == f"{PRESET}.yaml"
    assert PRESET not in preset_names("search_spaces")
    with pytest.raises(ConfigError, match="no study preset"):
        locate(PRESET, "search_spaces")
    ran = run("moe", "elyza-moe-2x13", "out")
    assert ran.status == 2
    assert f"did you mean {PRESET}?" in ran.err
    (here / "elyza").mkdir()
    for name, model in (("13b-instruct", "base"), ("13b", "expert")):
        (here / "elyza" / f"ELYZA-japanese-Llama-2-{name}").symlink_to(here / model)
    ran = run("moe", PRESET, "out")
    assert (ran.status, ran.out) == (0, "out\n")
    assert tiny.read_tensors(here / "out")["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "command",
    ["merge moe.yaml OUT", "moe moe.yaml OUT", "gguf base OUT", "extract-lora base base OUT"],
)
def test_a_name_that_nothing_can_have_is_told_before_anything_is_read(
    command: str, here: Path
) -> None:
    ran = run(*command.replace("OUT", "a" * 250).split())
    assert ran.status == 2
    assert "cannot be written: File name too long" in ran.err
    assert ran.out == ""
