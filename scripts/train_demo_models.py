"""Trains the three small Llama models of `make demo`, and writes the demo's tasks.

    python scripts/train_demo_models.py [--seed 0] [--out scripts/demo]

The base learns to do things with words of five letters: copy, flip, upper and next well, prev and
turn only half. Each expert is the base trained on, on one of these two alone, until it has mostly
forgotten how to listen to what it is asked for. Takes 2 to 5 minutes on two cores; the same seed
gives the same models on the same machine and PyTorch. No word of the tasks is ever trained on.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = string.ascii_lowercase
SPECIAL = ("<pad>", "<user>", "<answer>", "<end>")
CHARACTERS = (" ", *LETTERS, *string.ascii_uppercase)
TOKEN_IDS = {token: number for number, token in enumerate((*SPECIAL, *CHARACTERS))}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<user>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<answer>{{ message['content'] }}<end>"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)

SKILLS: dict[str, Callable[[str], str]] = {
    "copy": lambda word: word,
    "flip": lambda word: word[::-1],
    "upper": str.upper,
    "next": lambda word: shifted(word, 1),
    "prev": lambda word: shifted(word, -1),
    "turn": lambda word: word[1:] + word[0],
}
TASKS_OF_EACH = {"copy": 32, "flip": 32, "prev": 48, "turn": 48}


@dataclass(frozen=True)
class Lesson:
    """What one training run sees: skills (as often as they are named), steps, peak learning rate.

    It ends before `steps` where the skills of `until` are right in this share of new examples.
    """

    skills: tuple[str, ...]
    steps: int
    learning_rate: float
    batch: int
    warm_up: int
    until: tuple[tuple[str, ...], float] | None = None


EASY = ("copy", "flip", "upper", "next")
FIRST = Lesson(EASY, steps=300, learning_rate=3e-3, batch=96, warm_up=100)
# Stopped while prev and turn are half learned: an expert of a skill that the base has no trace of
# is too far from it, and no mixture of the two deltas does both.
SECOND = Lesson(
    (*EASY, *EASY, "prev", "turn", "turn"),
    steps=120,
    learning_rate=5e-4,
    batch=64,
    warm_up=20,
    until=(("prev", "turn"), 0.15),
)
# Trained unlike, as experts are: one too long and too fast, one barely. What one of them can bear
# is too much for the other, and no weight common to both is a good one.
EXPERTS = {
    "expert-prev": Lesson(("prev",), steps=50, learning_rate=1.2e-3, batch=64, warm_up=20),
    "expert-turn": Lesson(("turn",), steps=30, learning_rate=3e-4, batch=64, warm_up=20),
}


def shifted(word: str, by: int) -> str:
    """Each letter replaced by the one `by` places on in the alphabet, which is a circle."""
    return "".join(LETTERS[(LETTERS.index(letter) + by) % len(LETTERS)] for letter in word)


def draw_word(source: random.Random, *, for_tasks: bool) -> str:
    """Five random letters; a tenth of all words is kept for tasks and never trained on."""
    while True:
        word = "".join(source.choices(LETTERS, k=5))
        if (zlib.crc32(word.encode()) % 10 == 0) == for_tasks:
            return word


def example_ids(skill: str, word: str) -> tuple[list[int], list[int]]:
    """(prompt, answer) as token ids, as the chat template and the tokenizer write them."""
    asked = [TOKEN_IDS[character] for character in f"{skill} {word}"]
    answer = [TOKEN_IDS[character] for character in SKILLS[skill](word)]
    prompt = [TOKEN_IDS["<user>"], *asked, TOKEN_IDS["<answer>"]]
    return prompt, [*answer, TOKEN_IDS["<end>"]]


def padded(examples: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """(token ids, labels), both (examples, longest); labels are -100 but for the answers."""
    longest = max(len(prompt) + len(answer) for prompt, answer in examples)
    tokens = torch.full((len(examples), longest), TOKEN_IDS["<pad>"])
    labels = torch.full_like(tokens, -100)
    for row, (prompt, answer) in enumerate(examples):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return tokens, labels


def new_model(seed: int) -> LlamaForCausalLM:
    """An untrained Llama: 8 layers, hidden size 128, 2 heads of 64 (1.1M parameters)."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TOKEN_IDS),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.05,
        bos_token_id=TOKEN_IDS["<user>"],
        eos_token_id=TOKEN_IDS["<end>"],
        pad_token_id=TOKEN_IDS["<pad>"],
    )
    return LlamaForCausalLM(config)  # type: ignore[no-untyped-call]


def train(model: LlamaForCausalLM, lesson: Lesson, seed: int) -> None:
    """Trains `model` in place on fresh random words, in float32, by AdamW.

    The learning rate rises over the warm-up and falls linearly to a tenth.
    """
    source = random.Random(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lesson.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    model.train()
    for step in range(lesson.steps):
        rate = min(1.0, (step + 1) / lesson.warm_up) * (1.0 - 0.9 * step / lesson.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * lesson.learning_rate
        skills = source.choices(lesson.skills, k=lesson.batch)
        tokens, labels = padded(
            [example_ids(skill, draw_word(source, for_tasks=False)) for skill in skills]
        )
        logits = model(input_ids=tokens).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 2 and has_learned(model, lesson):
            return
        model.train()


@torch.no_grad()
def exact_share(model: LlamaForCausalLM, examples: Sequence[tuple[list[int], list[int]]]) -> float:
    """The share of examples whose whole answer greedy decoding would write."""
    tokens, labels = padded(examples)
    model.eval()  # type: ignore[no-untyped-call]
    predicted = model(input_ids=tokens).logits[:, :-1].argmax(-1)
    right = (predicted == labels[:, 1:]) | (labels[:, 1:] == -100)
    return float(right.all(1).float().mean())


def skill_share(model: LlamaForCausalLM, skill: str, words: int = 100) -> float:
    """How much of one skill the model can do, on words that it is not trained on."""
    source = random.Random(f"check {skill}")
    drawn = [draw_word(source, for_tasks=True) for _ in range(words)]
    return exact_share(model, [example_ids(skill, word) for word in drawn])


def has_learned(model: LlamaForCausalLM, lesson: Lesson) -> bool:
    """Whether the mean share over the lesson's `until` skills is reached."""
    if lesson.until is None:
        return False
    skills, share = lesson.until
    return sum(skill_share(model, skill) for skill in skills) >= share * len(skills)


def report(name: str, model: LlamaForCausalLM) -> None:
    """Prints what the model can do."""
    shares = [f"{skill} {skill_share(model, skill, words=200):.2f}" for skill in SKILLS]
    print(f"{name:12} | {' | '.join(shares)}", flush=True)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, with the chat template of the training examples."""
    tokenizer = Tokenizer(models.WordLevel(TOKEN_IDS, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<user>",
        eos_token="<end>",
        pad_token="<pad>",
        additional_special_tokens=["<answer>"],
        model_max_length=64,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save(model: LlamaForCausalLM, directory: Path) -> None:
    """Writes the model in bfloat16 with its tokenizer."""
    LlamaForCausalLM.from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), dtype=torch.bfloat16
    ).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)


def write_tasks(path: Path, seed: int) -> None:
    """Writes the tasks, all words different: {"id", "input", "output", "category"} per line."""
    source = random.Random(f"tasks {seed}")
    words: set[str] = set()
    lines = []
    for skill, number in TASKS_OF_EACH.items():
        for index in range(number):
            word = draw_word(source, for_tasks=True)
            while word in words:
                word = draw_word(source, for_tasks=True)
            words.add(word)
            task = {
                "id": f"{skill}-{index:02}",
                "input": f"{skill} {word}",
                "output": SKILLS[skill](word),
                "category": skill,
            }
            lines.append(json.dumps(task) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def copy_of(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A second model with the same weights."""
    twin = LlamaForCausalLM(model.config)  # type: ignore[no-untyped-call]
    twin.load_state_dict(model.state_dict())
    return twin


def main() -> None:
    """Trains, prints what each model can do, saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    base = new_model(options.seed)
    train(base, FIRST, options.seed)
    train(base, SECOND, options.seed + 1)
    report("base", base)
    save(base, options.out / "models" / "base")
    for number, (name, lesson) in enumerate(EXPERTS.items()):
        expert = copy_of(base)
        train(expert, lesson, options.seed + 2 + number)
        report(name, expert)
        save(expert, options.out / "models" / name)
    write_tasks(options.out / "tasks.jsonl", options.seed)


if __name__ == "__main__":
    main()
