"""The compiled kernel: the bits of torch's, whatever the numbers; trusted where it may be alone."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from evomerge.cli import main
from evomerge.merge import native, streaming
from evomerge.merge.blends import Blend
from evomerge.merge.checkpoint import bytes_of
from evomerge.merge.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, DType
from evomerge.merge.kernels import blend_bytes
from evomerge.merge.materialize import materialize
from evomerge.merge.native import NativeBlend, native_blend
from tests import method_recipes, tiny

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (BFLOAT16, FLOAT16, FLOAT32)
# Whole vectors of any processor, blocks of the kernel, and rests of both.
OTHER_DTYPES = ("float16", "float32", "float64")
SIZES = (1, 7, 31, 1023, 1024, 1025, 5000)

pytestmark = pytest.mark.skipif(native_blend() is None, reason="no C compiler here")


def kernel() -> NativeBlend:
    found = native_blend()
    assert found is not None
    return found


def blends(number: int) -> Iterator[Blend]:
    """Every kernel over that many inputs."""
    weights = (0.7, -1.3, 1 / 3, 1e-5)
    yield Blend("linear", weights[:number])
    if number == 1:
        yield Blend("passthrough")
    else:
        yield Blend("task_arithmetic", weights[: number - 1])


def agree(blend: Blend, inputs: list[Tensor], dtype: DType) -> None:
    """Asserts the same bits, NaN aside, and the same word on whether all are finite."""
    dtypes = [next(one for one in DTYPES if one.torch == tensor.dtype) for tensor in inputs]
    pieces = [bytes_of(tensor) for tensor in inputs]
    eager, compiled = (torch.zeros(len(inputs[0]), dtype=dtype.torch) for _ in range(2))
    is_finite = blend_bytes(blend, pieces, dtypes, bytes_of(eager), dtype)
    assert kernel()(blend, pieces, dtypes, bytes_of(compiled), dtype) == is_finite
    assert torch.equal(eager.isnan(), compiled.isnan()), (blend, dtypes, dtype)
    bits = torch.int32 if dtype.itemsize == 4 else torch.int16
    numbers = ~eager.isnan()
    assert torch.equal(eager.view(bits)[numbers], compiled.view(bits)[numbers]), (blend, dtypes)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("out", DTYPES, ids=str)
def test_any_mix_of_types_has_the_bits_of_the_torch_kernels(number: int, out: DType) -> None:
    generator = torch.Generator().manual_seed(number)
    numbers = [torch.randn(max(SIZES), generator=generator) for _ in range(number)]
    for blend in blends(number):
        for mix in itertools.product(DTYPES, repeat=number):
            for size in SIZES if len(set(mix)) == 1 else (1025,):
                inputs = [one[:size].to(its.torch) for one, its in zip(numbers, mix, strict=True)]
                agree(blend, inputs, out)


def every_half(dtype: DType) -> Tensor:
    """All 65536 numbers of a type of 16 bits: zeros, subnormals, infinities and NaN among them."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype.torch)


@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("its", [BFLOAT16, FLOAT16], ids=str)
def test_every_number_of_16_bits_is_read_and_rounded_as_by_torch(its: DType, out: DType) -> None:
    numbers = every_half(its)
    agree(Blend("passthrough"), [numbers], out)
    for other in (numbers.flip(0), numbers.roll(12345)):
        agree(Blend("linear", (0.7, 0.3)), [numbers, other], out)
        agree(Blend("task_arithmetic", (1.3,)), [numbers, other], out)


@pytest.mark.parametrize("out", [BFLOAT16, FLOAT16], ids=str)
def test_float32_numbers_beside_every_number_of_16_bits_are_rounded_as_by_torch(out: DType) -> None:
    # Halves, ties between them, and their neighbours; among them those that become infinite.
    halves = every_half(out).float().nan_to_num(0.0, 0.0, 0.0)
    higher = torch.roll(halves, -1)
    ties = ((halves.double() + higher.double()) / 2).float()
    around = [torch.nextafter(ties, torch.full_like(ties, end)) for end in (-1e38, 1e38)]
    for numbers in (halves, ties, *around, halves * 1.0001):
        agree(Blend("passthrough"), [numbers], out)
    for bits in (0x1, 0x7FFFFF, 0x7F7FFFFF, 0x7F800000, 0x7FC00000):
        one = torch.full((40,), bits, dtype=torch.int32).view(torch.float32)
        agree(Blend("passthrough"), [one], out)
        agree(Blend("passthrough"), [-one], FLOAT32)


@pytest.mark.parametrize("place", [0, 500, 1999])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_number_that_is_not_finite_is_told(dtype: DType, wrong: float, place: int) -> None:
    inputs = [torch.ones(2000, dtype=dtype.torch) for _ in range(2)]
    out = torch.empty(2000, dtype=dtype.torch)
    memory = [bytes_of(one) for one in inputs]
    for blend in blends(2):
        assert kernel()(blend, memory, [dtype] * 2, bytes_of(out), dtype)
    inputs[1][place] = wrong
    for blend in blends(2):
        assert not kernel()(blend, memory, [dtype] * 2, bytes_of(out), dtype)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base in bfloat16, and tuned ones in bfloat16, float16 and float32."""
    root = tmp_path_factory.mktemp("models")
    base = tiny.llama(root / "base", layers=2)
    return [base, *(tiny.variant(base, root / f"tuned{seed}", seed=seed) for seed in (1, 2))]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "bfloat16") for name in method_recipes.NAMES),
        *itertools.product(
            ("linear", "task_arithmetic", "passthrough"), ("float16", "float32", "float64")
        ),
        *(("slerp", dtype) for dtype in OTHER_DTYPES),
    ],
)
def test_a_model_has_the_same_bits_without_a_compiler(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str
) -> None:
    base, *tuned = map(str, models)
    recipe = method_recipes.recipe_for(name, base, tuned, dtype)
    compiled = tiny.read_tensors(materialize(recipe, tmp_path / "compiled"))
    monkeypatch.setattr(streaming, "native_blend", lambda: None)
    eager = tiny.read_tensors(materialize(recipe, tmp_path / "eager"))
    assert compiled.keys() == eager.keys()
    assert [key for key in eager if not torch.equal(eager[key], compiled[key])] == []


RECIPE = """
merge_method: task_arithmetic
base_model: {base}
models: [{{model: {tuned}, parameters: {{weight: 0.7}}}}]
dtype: bfloat16
"""


def test_such_a_merge_imports_neither_torch_nor_numpy(models: list[Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(base=models[0], tuned=models[1]))
    script = (
        "import sys; from evomerge.cli import main; status = main(sys.argv[1:]);"
        "print(status, sorted({'torch', 'numpy', 'transformers', 'jinja2'} & set(sys.modules)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, "merge", str(recipe), str(tmp_path / "out")],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert ran.stdout.splitlines()[-1] == "0 []"
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of kernels in a cache of this test's own; what is loaded is forgotten."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native_blend.cache_clear()
    yield tmp_path / "evomerge"
    native_blend.cache_clear()


def test_it_is_compiled_once_and_for_its_owner_alone(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native_blend() is not None
    (library,) = cache.iterdir()
    assert [path.stat().st_mode & 0o077 for path in (cache, library)] == [0, 0]
    native_blend.cache_clear()
    monkeypatch.setattr(native, "_run", lambda _: pytest.fail("compiles again"))
    assert native_blend() is not None


@pytest.mark.parametrize("others", ["folder", "library"])
def test_code_that_others_can_write_is_not_run(cache: Path, others: str) -> None:
    assert native_blend() is not None
    (library,) = cache.iterdir()
    library.unlink()  # the file that is loaded stays as it is
    library.write_bytes(b"theirs")
    (cache if others == "folder" else library).chmod(0o777)
    native_blend.cache_clear()
    found = native_blend()
    assert found is not None
    agree_once(found)
    assert (library.read_bytes() == b"theirs") == (others == "folder")


def test_a_damaged_library_is_compiled_anew(cache: Path) -> None:
    cache.mkdir(mode=0o700)
    compiler = native._compiler()
    assert compiler is not None
    library = cache / native._library_name(compiler)
    library.write_bytes(b"")
    library.chmod(0o700)
    found = native_blend()
    assert found is not None
    agree_once(found)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "'unbalanced"])
def test_without_a_compiler_that_works_there_is_none(
    cache: Path, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    assert native_blend() is None
    assert not cache.exists() or os.listdir(cache) == []


def test_the_compiler_of_the_environment_is_asked_with_its_options(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = native._compiler()
    assert usual is not None
    monkeypatch.setenv("CC", f"{usual[0]} -DANYTHING=1")
    assert native._compiler() == [*usual, "-DANYTHING=1"]
    assert native._library_name(usual) != native._library_name([*usual, "-DANYTHING=1"])
    assert native_blend() is not None
    assert len(os.listdir(cache)) == 1


@pytest.mark.parametrize("option", ["-ffp-contract=fast -mfma", "-ffast-math"])
def test_a_compiler_that_breaks_the_rules_of_arithmetic_is_not_used(
    tmp_path: Path, option: str
) -> None:
    usual = native._compiler()
    assert usual is not None
    if subprocess.run([*usual, *option.split(), "-E", "-"], check=False, input=b"").returncode:
        pytest.skip(f"{usual[0]} has no {option}")
    # Our options come after the user's and win; so a compiler that takes no notice of them.
    wrapper = tmp_path / "cc"
    wrapper.write_text(f'#!/bin/sh\nexec {usual[0]} "$@" {option}\n')
    wrapper.chmod(0o755)
    # In a process of its own: loading what fast maths made may change how all of it computes.
    script = "from evomerge.merge.native import native_blend; print(native_blend())"
    ran = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "CC": str(wrapper), "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert ran.stdout == "None\n"
    assert os.listdir(tmp_path / "evomerge") == []


def agree_once(found: NativeBlend) -> None:
    numbers = torch.ones(3)
    out = torch.empty(3)
    memory = [bytes_of(numbers), bytes_of(numbers)]
    assert found(Blend("linear", (0.5, 2.0)), memory, [FLOAT32] * 2, bytes_of(out), FLOAT32)
    assert out.tolist() == [2.5] * 3


def test_float64_is_left_to_torch() -> None:
    assert NativeBlend.takes(DTYPES)
    assert not NativeBlend.takes([BFLOAT16, FLOAT64])


def test_the_command_says_what_it_did(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(base=models[0], tuned=models[1]))
    assert main(["merge", str(recipe), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
