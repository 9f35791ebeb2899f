"""Valid recipes, and what carelessness, malice and bad disks make of them: a seeded mutator."""

from __future__ import annotations

import copy
import functools
import itertools
import random
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from evomerge.merge_rules import METHODS, PARAMETER_NAMES, MethodRules, Parameter
from tests.golden import moe_cases

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

HAND_WRITTEN = Path(__file__).with_name("recipes.yaml")

JUNK: tuple[Any, ...] = (
    *(None, True, False, "", " ", "x", "base", "0.5", "nan", "1e999", "~", "~root", "a+b+c"),
    *("o/n@main", "../..", "/", "\0", "é\u2028\ud800", "a" * 5000, [], {}, [[]], [{}], [None]),
    *(0, 1, 2, -1, 4, 10**30, 10**400, -0.1, 0.5, 1.5, 1e308, 1e-320),
    *(float("nan"), float("inf"), float("-inf"), [0.1, 0.9], [0, 4], [True, False], {"a": 1}),
    *({"filter": "mlp"}, {"filter": "mlp", "value": 0.5}, {"value": [1, {}]}, {"model": "base"}),
    *([{"filter": "mlp", "value": 1}, 0.5], {1: 2}, {None: None}, [["base"]], {"kind": "zero"}),
)

KEYS = (
    *("merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype"),
    *("out_dtype", "tokenizer_source", "tokenizer", "chat_template", "model", "layer_range"),
    *("sources", "weight", "density", "default", "text_decoder", "source", "tokens", "kind"),
    *("residual_weight", "pad_to_multiple_of", "filter", "value", "lora", "path", "wieght", ""),
    *("experts", "source_model", "gate_mode", "positive_prompts", "shared_experts", "noise_scale"),
    *PARAMETER_NAMES,
)

TEXTS = (
    "&a [*a]",
    "&a {b: *a}",
    "*nobody",
    "!!python/object/apply:os.system ['true']",
    "!!binary '=='",
    "!!timestamp x",
    "!!bool maybe",
    "!!int x",
    "!!float x",
    "!!null x",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!unknown x",
    "2001-99-99",
    "2001-01-01",
    "0x",
    "1:99:99",
    "1_0",
    "9" * 5000,
    "[" * 3000,
    "[" * 400 + "]" * 400,
    "{a: " * 200 + "1" + "}" * 200,
    "- " * 2000,
    "{? [a] : b}",
    "{? {a: b} : c}",
    "{<<: {weight: 1}, weight: 2}",
    "{<<: [1, 2]}",
    "{<<: *x}",
    '"\\ud800"',
    '"\\x00"',
    "%YAML 9.9",
    "--- ---",
    "...",
    "\t",
    "\x07",
    "\ufeff",
    "'",
    "|2\n x",
    "&a1 [x,x,x,x,x,x,x,x,x], &a2 [*a1,*a1,*a1,*a1,*a1,*a1,*a1,*a1,*a1], "
    "&a3 [*a2,*a2,*a2,*a2,*a2,*a2,*a2,*a2,*a2], &a4 [*a3,*a3,*a3,*a3,*a3,*a3,*a3,*a3,*a3], "
    "&a5 [*a4,*a4,*a4,*a4,*a4,*a4,*a4,*a4,*a4], &a6 [*a5,*a5,*a5,*a5,*a5,*a5,*a5,*a5,*a5], "
    "&a7 [*a6,*a6,*a6,*a6,*a6,*a6,*a6,*a6,*a6], &a8 [*a7,*a7,*a7,*a7,*a7,*a7,*a7,*a7,*a7]",
)


@functools.cache
def seeds() -> list[dict[str, Any]]:
    """Recipes that are right: the recorded ones, one that uses all of each method, and others."""
    files = [HAND_WRITTEN, *sorted(GOLDEN.glob("*.yaml"))]
    written = [yaml.safe_load_all(file.read_text(encoding="utf-8")) for file in files]
    return [*itertools.chain(*written), *(_full(rules) for rules in METHODS.values())]


@functools.cache
def mixtures() -> list[dict[str, Any]]:
    """Mixtures of experts that are right."""
    scaled = {"source_model": "first", "noise_scale": 0.1, "residual_scale": 0.5}
    more = {"base_model": "base", "gate_mode": "uniform_random", "experts_per_token": 1}
    more |= {"experts": [{"source_model": "base"}, scaled], "architecture": "mixtral"}
    return [*(yaml.safe_load(textwrap.dedent(text)) for text in moe_cases.CASES.values()), more]


def mutated(case: int, corpus: list[dict[str, Any]]) -> bytes:
    """A file's content with something wrong in it, or not: for the same case the same."""
    chance = random.Random(f"recipe {case}")
    recipe = copy.deepcopy(chance.choice(corpus))
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
        recipe = chance.choice(_TREE_CHANGES)(chance, recipe, corpus)
    text = written(recipe).decode("utf-8", errors="surrogatepass")
    if chance.random() < 0.3:
        text = chance.choice(_TEXT_CHANGES)(chance, text)
    content = text.encode("utf-8", errors="surrogatepass")
    if chance.random() < 0.08:
        content = chance.choice(_BYTE_CHANGES)(chance, content)
    return content


def written(recipe: Any) -> bytes:
    """A recipe as a file's content."""
    text = yaml.safe_dump(recipe, allow_unicode=True, default_flow_style=None, sort_keys=False)
    return text.encode("utf-8", errors="surrogatepass")


def _full(rules: MethodRules) -> dict[str, Any]:
    """A recipe with every parameter of a method."""
    names = ("first", "second") if rules.inputs[1] != 1 else ("first",)
    own = {one.name: _example(one) for one in rules.parameters if one.own}
    recipe: dict[str, Any] = {
        "merge_method": rules.name,
        "models": [{"model": name, "parameters": dict(own)} for name in names],
        "parameters": {one.name: _example(one) for one in rules.parameters if not one.own},
        "dtype": "float32",
    }
    if rules.base != "none":
        recipe["base_model"] = "base"
    return recipe


def _example(parameter: Parameter) -> object:
    if parameter.default is not None:
        return parameter.default
    return [0.1, 0.4]


def _places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every node of a tree but its root."""
    children = node.items() if isinstance(node, dict) else ()
    for key, child in enumerate(node) if isinstance(node, list) else children:
        yield (*path, key)
        yield from _places(child, (*path, key))


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _pick(chance: random.Random, tree: Any) -> tuple[Any, Any] | None:
    """A parent and the key of one of its children; None in a tree without any."""
    places = list(_places(tree))
    if not places:
        return None
    path = chance.choice(places)
    return _at(tree, path[:-1]), path[-1]


def _typo(chance: random.Random, word: str) -> str:
    if not word:
        return "q"
    at = chance.randrange(len(word))
    swapped = word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :]
    return chance.choice((word[:at] + word[at + 1 :], swapped, word[:at] + "q" + word[at:]))


def _drop(chance: random.Random, tree: Any, corpus: list[Any]) -> Any:
    if place := _pick(chance, tree):
        del place[0][place[1]]
    return tree


def _replace(chance: random.Random, tree: Any, corpus: list[Any]) -> Any:
    place = _pick(chance, tree)
    junk = copy.deepcopy(chance.choice(JUNK))
    if place is None or chance.random() < 0.02:
        return junk
    place[0][place[1]] = junk
    return tree


def _rename(chance: random.Random, tree: Any, corpus: list[Any]) -> Any:
    if (place := _pick(chance, tree)) and isinstance(place[0], dict):
        value = place[0].pop(place[1])
        new = _typo(chance, str(place[1])) if chance.random() < 0.5 else chance.choice(KEYS)
        place[0][new] = value
    return tree


def _misspell(chance: random.Random, tree: Any, corpus: list[Any]) -> Any:
    words = [path for path in _places(tree) if isinstance(_at(tree, path), str)]
    if words:
        path = chance.choice(words)
        _at(tree, path[:-1])[path[-1]] = _typo(chance, _at(tree, path))
    return tree


def _repeat(chance: random.Random, tree: Any, corpus: list[Any]) -> Any:
    if (place := _pick(chance, tree)) and isinstance(place[0], list):
        place[0].insert(place[1], copy.deepcopy(place[0][place[1]]))
    return tree


def _nest(chance: random.Random, tree: Any, corpus: list[Any]) -> Any:
    if place := _pick(chance, tree):
        parent, key = place
        parent[key] = chance.choice(([parent[key]], {"value": parent[key]}, {key: parent[key]}))
    return tree


def _graft(chance: random.Random, tree: Any, corpus: list[Any]) -> Any:
    """Puts a part of another recipe, or of this one, where it may not belong."""
    donor = chance.choice((tree, chance.choice(corpus)))
    source, target = _pick(chance, donor), _pick(chance, tree)
    if source and target:
        target[0][target[1]] = copy.deepcopy(source[0][source[1]])
    return tree


def _add(chance: random.Random, tree: Any, corpus: list[Any]) -> Any:
    mappings = [path for path in ((), *_places(tree)) if isinstance(_at(tree, path), dict)]
    if mappings:
        _at(tree, chance.choice(mappings))[chance.choice(KEYS)] = copy.deepcopy(chance.choice(JUNK))
    return tree


def _shift_layers(chance: random.Random, tree: Any, corpus: list[Any]) -> Any:
    ranges = [path for path in _places(tree) if path[-1] == "layer_range"]
    if ranges:
        path = chance.choice(ranges)
        numbers = (-1, 0, 1, 2, 3, 4, 5, 10**9, 2.0, True, "3", None)
        length = chance.choice((0, 1, 2, 2, 2, 2, 3))
        _at(tree, path[:-1])["layer_range"] = [chance.choice(numbers) for _ in range(length)]
    return tree


def _other_number(chance: random.Random, tree: Any, corpus: list[Any]) -> Any:
    numbers = [path for path in _places(tree) if isinstance(_at(tree, path), int | float)]
    if numbers:
        path = chance.choice(numbers)
        other = chance.choice(
            (-3, -0.5, 0, 1e-9, 0.999, 1.01, 7, 10**9, 1e39, -1e308, float("nan"))
        )
        _at(tree, path[:-1])[path[-1]] = other
    return tree


def _cut(chance: random.Random, text: str) -> str:
    return text[: chance.randrange(len(text) + 1)]


def _insert(chance: random.Random, text: str) -> str:
    at = chance.randrange(len(text) + 1)
    return text[:at] + chance.choice(TEXTS) + text[at:]


def _replace_value(chance: random.Random, text: str) -> str:
    """Puts a text in the place of what stands behind some `key: `."""
    lines = text.splitlines()
    at = chance.randrange(len(lines)) if lines else 0
    head, colon, _ = lines[at].partition(": ") if lines else ("", "", "")
    return "\n".join([*lines[:at], head + (colon or ": ") + chance.choice(TEXTS), *lines[at + 1 :]])


def _swap_lines(chance: random.Random, text: str) -> str:
    lines = text.splitlines()
    chance.shuffle(lines)
    return "\n".join(lines)


def _repeat_line(chance: random.Random, text: str) -> str:
    lines = text.splitlines() or [""]
    at = chance.randrange(len(lines))
    return "\n".join([*lines[: at + 1], *lines[at:]])


def _flip(chance: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice((1, 2, 8))):
        if changed:
            changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def _other_encoding(chance: random.Random, content: bytes) -> bytes:
    text = content.decode("utf-8", errors="ignore")
    return text.encode(chance.choice(("utf-16", "utf-8-sig", "utf-32", "cp500")), errors="replace")


TreeChange = Callable[[random.Random, Any, list[Any]], Any]
_TREE_CHANGES: tuple[TreeChange, ...] = (
    *(_drop, _replace, _replace, _rename, _misspell, _repeat, _nest, _graft, _add),
    *(_shift_layers, _other_number, _other_number),
)
_TEXT_CHANGES = (_cut, _insert, _insert, _replace_value, _replace_value, _swap_lines, _repeat_line)
_BYTE_CHANGES = (_flip, _other_encoding)
