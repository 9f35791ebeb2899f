"""LoRA adapters extracted from fine-tuned models, put back by our own code and by PEFT."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from evomerge.cli import main
from evomerge.errors import ConfigError, OutputExistsError, RunError
from evomerge.merge.extract import extract_lora, truncated_svd
from evomerge.merge.lora import apply_adapter
from tests import tiny
from tests.merge.test_gguf import files_of_at_most

LAYERS = 2
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "base"
    return tiny.llama(directory, layers=LAYERS, dtype=torch.float32, max_shard_size="400KB")


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def low_rank(shape: torch.Size, rank: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape[0], rank, generator=generator)
    return 0.05 * rows @ torch.randn(rank, shape[1], generator=generator)


def tuned(base: Path, out: Path, change: Callable[[str, int, Tensor], Tensor]) -> Path:
    """A copy of `base` in one file, with `change` applied to each tensor (name, place, numbers)."""
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {
        name: change(name, place, tensor).contiguous()
        for place, (name, tensor) in enumerate(sorted(tiny.read_tensors(base).items()))
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def with_deltas(base: Path, out: Path, rank: int) -> Path:
    """Every linear layer of `base` plus a matrix of rank `rank`."""

    def change(name: str, place: int, tensor: Tensor) -> Tensor:
        return tensor + low_rank(tensor.shape, rank, place) if is_linear(name) else tensor

    return tuned(base, out, change)


def everything_moved(base: Path, out: Path) -> Path:
    def change(name: str, place: int, tensor: Tensor) -> Tensor:
        del name
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(place))
        return tensor + 0.02 * noise.to(tensor.dtype)

    return tuned(base, out, change)


def config_of(adapter: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    return config


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def test_a_rank_4_difference_is_explained_wholly_and_given_back(base: Path, tmp_path: Path) -> None:
    fine = with_deltas(base, tmp_path / "fine", rank=4)
    found = extract_lora(fine, base, tmp_path / "lora", 4)
    assert found.total == pytest.approx(1.0, abs=1e-6)
    assert set(found.ranks.values()) == {4}
    assert len(found.ranks) == LAYERS * len(MODULES)
    assert (found.saved, found.lost, found.notes) == ((), (), ())
    back = tiny.read_tensors(apply_adapter(base, tmp_path / "lora", tmp_path / "back"))
    assert distance(back, tiny.read_tensors(fine)) < 2e-6


def test_no_more_ranks_are_kept_than_there_are(base: Path, tmp_path: Path) -> None:
    fine = with_deltas(base, tmp_path / "fine", rank=3)
    # What rounding of base + delta leaves is no rank; it is far above float32's own noise of 0.
    found = extract_lora(fine, base, tmp_path / "lora", 40, explained=0.999999)
    assert set(found.ranks.values()) == {3}
    assert config_of(tmp_path / "lora")["r"] == 3


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_lower_rank_leaves_the_tail_of_the_singular_values(
    rank: int, base: Path, tmp_path: Path
) -> None:
    fine = with_deltas(base, tmp_path / "fine", rank=4)
    found = extract_lora(fine, base, tmp_path / "lora", rank)
    before, wanted = tiny.read_tensors(base), tiny.read_tensors(fine)
    back = tiny.read_tensors(apply_adapter(base, tmp_path / "lora", tmp_path / "back"))
    kept = energy = 0.0
    for name in filter(is_linear, before):
        values = torch.linalg.svdvals((wanted[name] - before[name]).double())
        residual = float((wanted[name].double() - back[name].double()).norm())
        assert residual == pytest.approx(float(values[rank:].norm()), rel=1e-4)
        kept += float(values[:rank].square().sum())
        energy += float(values.square().sum())
    assert found.total == pytest.approx(kept / energy, rel=1e-6)
    assert 0 < found.total < 1


def test_peft_gives_the_fine_tuned_model_back(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed (pip install .[train])")
    fine = with_deltas(base, tmp_path / "fine", rank=4)
    extract_lora(fine, base, tmp_path / "lora", 4)
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora"
    )
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = tiny.read_tensors(tmp_path / "merged")
    assert distance(merged, tiny.read_tensors(fine)) < 2e-6
    assert config_of(tmp_path / "lora")["target_modules"] == [
        *("down_proj", "gate_proj", "up_proj"),
        *("k_proj", "o_proj", "q_proj", "v_proj"),
    ]


def test_peft_takes_ranks_by_module_and_what_is_saved_whole(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed (pip install .[train])")

    def change(name: str, place: int, tensor: Tensor) -> Tensor:
        if "layers.0" in name and is_linear(name):
            return tensor + low_rank(tensor.shape, 1 + place % 3, place)
        return tensor + 0.1 if "norm" in name or "embed" in name or "lm_head" in name else tensor

    fine = tuned(base, tmp_path / "fine", change)
    found = extract_lora(fine, base, tmp_path / "lora", 8, explained=0.99999, save_others=True)
    assert set(found.ranks.values()) == {1, 2, 3}
    assert found.lost == ()
    assert len(found.saved) == 2 * LAYERS + 2
    config = config_of(tmp_path / "lora")
    assert config["r"] == config["lora_alpha"] == 3
    assert set(config["rank_pattern"].values()) == {1, 2}
    assert "model.layers.0.self_attn.q_proj" in config["target_modules"]
    assert "lm_head" in config["target_modules"]
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora"
    )
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    wanted = tiny.read_tensors(fine)
    assert distance(tiny.read_tensors(tmp_path / "merged"), wanted) < 1e-5
    back = tiny.read_tensors(apply_adapter(base, tmp_path / "lora", tmp_path / "back"))
    assert distance(back, wanted) < 1e-5


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_a_mixtures_experts_get_factors_each_and_peft_puts_them_where_we_do(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed (pip install .[train])")
    config = MixtralConfig(**tiny._shape(1, 128, 261), num_local_experts=4)
    base = tiny._write(
        tmp_path / "base", MixtralForCausalLM, config, 0, torch.float32, False, "5GB"
    )
    fine = everything_moved(base, tmp_path / "fine")
    found = extract_lora(fine, base, tmp_path / "lora", 8)
    assert len(found.ranks) == 4 * 3 + 4 + 1
    assert "model.layers.0.block_sparse_moe.gate.weight" in found.lost
    ours = tiny.read_tensors(apply_adapter(base, tmp_path / "lora", tmp_path / "ours"))
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora"
    )
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert distance(tiny.read_tensors(tmp_path / "merged"), ours) < 1e-6
    whole = extract_lora(fine, base, tmp_path / "whole", 128, save_others=True)
    assert whole.lost == ()
    back = tiny.read_tensors(apply_adapter(base, tmp_path / "whole", tmp_path / "back"))
    assert distance(back, tiny.read_tensors(fine)) < 1e-5


def test_other_tensors_that_differ_are_told_or_put_in_whole(base: Path, tmp_path: Path) -> None:
    fine = everything_moved(base, tmp_path / "fine")
    found = extract_lora(fine, base, tmp_path / "lora", 200)
    others = {name for name in tiny.read_tensors(base) if not is_linear(name)} - {"lm_head.weight"}
    assert set(found.lost) == others
    assert any(note.startswith(f"{len(others)} tensors outside of linear") for note in found.notes)
    assert found.total == pytest.approx(1.0, abs=1e-6)
    assert set(found.explained) == {*MODULES, "lm_head"}
    whole = extract_lora(fine, base, tmp_path / "whole", 200, save_others=True)
    assert (set(whole.saved), whole.lost) == (others, ())
    back = tiny.read_tensors(apply_adapter(base, tmp_path / "whole", tmp_path / "back"))
    assert distance(back, tiny.read_tensors(fine)) < 1e-5


def test_a_bias_that_differs_takes_its_layer_with_it(tmp_path: Path) -> None:
    base = tiny.qwen2(tmp_path / "base", layers=1, dtype=torch.float32)
    fine = everything_moved(base, tmp_path / "fine")
    found = extract_lora(fine, base, tmp_path / "lora", 4, save_others=True)
    assert found.lost == ("model.embed_tokens.weight",)  # tied: input and output
    attention = "model.layers.0.self_attn"
    assert {f"{attention}.q_proj.bias", f"{attention}.q_proj.weight"} <= set(found.saved)
    assert f"{attention}.o_proj" in found.ranks
    back = tiny.read_tensors(apply_adapter(base, tmp_path / "lora", tmp_path / "back"))
    wanted = tiny.read_tensors(fine)
    for name in found.saved:
        assert torch.equal(back[name], wanted[name]), name


def test_a_rank_above_what_a_module_has_is_clipped_and_told(base: Path, tmp_path: Path) -> None:
    fine = everything_moved(base, tmp_path / "fine")
    found = extract_lora(fine, base, tmp_path / "lora", 100)
    assert found.ranks["model.layers.0.self_attn.k_proj"] == 64
    assert found.ranks["model.layers.0.self_attn.q_proj"] == 100
    assert found.notes[0].startswith("rank 100 is more than 4 modules have rows or columns")
    pattern = config_of(tmp_path / "lora")["rank_pattern"]
    assert pattern["model.layers.1.self_attn.v_proj"] == 64


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_factors_are_the_rounded_ones(dtype: str, base: Path, tmp_path: Path) -> None:
    fine = with_deltas(base, tmp_path / "fine", rank=2)
    extract_lora(fine, base, tmp_path / "wide", 2)
    extract_lora(fine, base, tmp_path / "narrow", 2, dtype=dtype)
    wide, narrow = tiny.read_tensors(tmp_path / "wide"), tiny.read_tensors(tmp_path / "narrow")
    assert wide.keys() == narrow.keys()
    for name, tensor in narrow.items():
        assert tensor.dtype == getattr(torch, dtype)
        assert torch.equal(tensor, wide[name].to(tensor.dtype)), name


def spectrum(rows: int, columns: int, values: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = values.numel()
    left = torch.linalg.qr(torch.randn(rows, count, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, count, generator=generator)).Q
    return left * values @ right.T


@pytest.mark.parametrize(
    "values",
    [
        1 / torch.arange(1, 601.0),
        1 / torch.arange(1, 601.0).sqrt(),
        torch.ones(600) - torch.arange(600) / 6000,  # nearly flat: no direction stands out
        torch.cat([torch.ones(5), torch.full((595,), 0.01)]),
    ],
    ids=["1/n", "1/√n", "flat", "rank 5 and noise"],
)
@pytest.mark.parametrize("shape", [(600, 900), (1100, 600)])
def test_the_randomised_decomposition_is_as_good_as_the_whole_one(
    values: Tensor, shape: tuple[int, int]
) -> None:
    rank = 16
    matrix = spectrum(*shape, values)
    left, found, right = truncated_svd(matrix, rank)
    assert (left.shape, found.shape, right.shape) == ((shape[0], 16), (16,), (16, shape[1]))
    best = float(values[rank:].square().sum())
    residual = float((matrix.double() - (left * found @ right).double()).square().sum())
    energy = float(values.square().sum())
    assert best * (1 - 1e-4) <= residual <= best + 1e-3 * energy
    # What is told as kept is what the factors leave, exactly.
    assert float(found.square().sum()) == pytest.approx(energy - residual, rel=1e-4)
    again = truncated_svd(matrix, rank)
    assert all(torch.equal(a, b) for a, b in zip((left, found, right), again, strict=True))


def test_a_share_stops_each_modules_rank(base: Path, tmp_path: Path) -> None:
    fine = everything_moved(base, tmp_path / "fine")
    found = extract_lora(fine, base, tmp_path / "lora", 128, explained=0.5)
    before, wanted = tiny.read_tensors(base), tiny.read_tensors(fine)
    for module, rank in found.ranks.items():
        name = f"{module}.weight"
        values = torch.linalg.svdvals(wanted[name] - before[name]).square()
        shares = values.cumsum(0) / values.sum()
        assert shares[rank - 1] >= 0.5 > (shares[rank - 2] if rank > 1 else 0.0)


def other_shape(base: Path, out: Path) -> Path:
    del base
    return tiny.llama(out, layers=LAYERS, dtype=torch.float32, vocabulary=270)


def deeper(base: Path, out: Path) -> Path:
    del base
    return tiny.llama(out, layers=LAYERS + 1, dtype=torch.float32)


def nan(base: Path, out: Path) -> Path:
    def change(name: str, place: int, tensor: Tensor) -> Tensor:
        return tensor * float("nan") if place == 7 and is_linear(name) else tensor

    return tuned(base, out, change)


def only_norms(base: Path, out: Path) -> Path:
    return tuned(base, out, lambda name, _, tensor: tensor + 1 if "norm" in name else tensor)


WRONG: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "identical": (lambda base, _: base, "does not differ from .*; there is nothing to extract"),
    "shape": (other_shape, r"embed_tokens.weight is of shape \[270, 128\] in the first and of sha"),
    "tensors": (
        deeper,
        r"model.layers.2.\S+ is of shape .* in the first and missing in the second",
    ),
    "numbers": (nan, "the difference of the models has NaN or infinite numbers"),
    "norms": (only_norms, "outside of its linear layers only .*, which --save-others puts into"),
}


@pytest.mark.parametrize("case", WRONG)
def test_models_that_give_no_adapter_are_refused_and_leave_nothing(
    case: str, base: Path, tmp_path: Path
) -> None:
    make, said = WRONG[case]
    fine = make(base, tmp_path / "fine")
    before = os.listdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        extract_lora(fine, base, tmp_path / "lora", 4)
    assert os.listdir(tmp_path) == before


def test_a_disk_that_fails_leaves_nothing(base: Path, tmp_path: Path) -> None:
    fine = with_deltas(base, tmp_path / "fine", rank=4)
    with files_of_at_most(5000), pytest.raises(RunError, match="writing failed"):
        extract_lora(fine, base, tmp_path / "lora", 4)
    assert os.listdir(tmp_path) == ["fine"]


def test_an_adapter_is_replaced_on_request_and_nothing_else_is(base: Path, tmp_path: Path) -> None:
    fine = with_deltas(base, tmp_path / "fine", rank=4)
    extract_lora(fine, base, tmp_path / "lora", 4)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        extract_lora(fine, base, tmp_path / "lora", 2)
    extract_lora(fine, base, tmp_path / "lora", 2, overwrite=True)
    assert config_of(tmp_path / "lora")["r"] == 2
    with pytest.raises(OutputExistsError, match="is not empty and no adapter"):
        extract_lora(fine, base, base, 2, overwrite=True)


def test_settings_that_a_model_computes_with_are_told_where_they_differ(
    base: Path, tmp_path: Path
) -> None:
    fine = tiny.edit_config(with_deltas(base, tmp_path / "fine", rank=1), rms_norm_eps=0.5)
    (note,) = extract_lora(fine, base, tmp_path / "lora", 1).notes
    assert note == "rms_norm_eps is 0.5 in fine, but 1e-06 in base, whose value stays"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_command_tells_the_share_and_its_adapter_merges(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base)
    fine = with_deltas(base, tmp_path / "fine", rank=4)
    status, out, err = run(capsys, "extract-lora", "fine", "base", "lora", "--rank", 4)
    assert (status, err) == (0, "")
    assert "q_proj                   2 modules  100.000%\n" in out
    assert out.endswith("explained               14 modules  100.000%\nadapter lora\n")
    assert config_of(tmp_path / "lora")["base_model_name_or_path"] == "base"
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": f"{base}+{tmp_path / 'lora'}", "parameters": {"weight": 1.0}}],
        "dtype": "float32",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    status, out, err = run(capsys, "merge", "recipe.yaml", "merged")
    assert status == 0, err
    assert distance(tiny.read_tensors(tmp_path / "merged"), tiny.read_tensors(fine)) < 2e-6


def test_the_command_gives_one_json_document(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fine, lora = everything_moved(base, tmp_path / "fine"), tmp_path / "lora"
    arguments = ("--rank", 2, "--json", "--storage", tmp_path / "storage", "--dtype", "bfloat16")
    status, out, err = run(capsys, "extract-lora", fine, base, lora, *arguments)
    assert status == 0
    assert err.startswith("note: 6 tensors outside of linear layers differ and are not in")
    told = json.loads(out)
    assert told["adapter"] == str(lora)
    assert 0 < told["explained"] < 0.5
    assert set(told["groups"]) == {*MODULES, "lm_head"}
    assert set(told["ranks"].values()) == {2}
    assert (len(told["lost"]), told["saved"]) == (6, [])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fine", "base", "lora", "--rank", "0"), "--rank: 0 should be at least 1"),
        (("fine", "base", "lora", "--rank", "4", "--explained", "1.5"), "--explained: 1.5 should"),
        (("fine", "base", "lora", "--rank", "4", "--dtype", "int8"), "--dtype: 'int8' is none of"),
        (("fine", "base", "fine", "--rank", "4", "--overwrite"), "fine: is an input, too"),
        (("fine", "base", "base", "--rank", "4", "--overwrite"), "base: is an input, too"),
        (("nothing", "base", "lora", "--rank", "4"), "nothing: this model is neither a folder"),
    ],
)
def test_a_command_that_cannot_be_right_is_refused(  # noqa: PLR0917
    arguments: tuple[str, ...],
    said: str,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, tmp_path / "base")
    with_deltas(base, tmp_path / "fine", rank=1)
    status, out, err = run(capsys, "extract-lora", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert said in err
    assert sorted(os.listdir(tmp_path)) == ["base", "fine"]
