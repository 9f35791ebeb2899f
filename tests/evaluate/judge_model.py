"""A tiny language model that can be a judge: it comes to a grade, and not always to the same."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny

DIGITS = "12345"
# How much more than any other token each is wanted, where a grammar allows it: first the end of a
# string, so that the reason ends, then what JSON is made of, so that no white space goes on.
WANTED = {'"': 100.0, "{": 2.0, "}": 2.0, ":": 2.0, ",": 2.0}
DIGIT_WISH = 10.0
RIDGE = 1e-2
ENDING = '{"reason":"","grade":'


def write_judge(directory: Path) -> Path:
    """A Llama of two layers whose grade depends on all that it reads, in no sensible way."""
    tiny.llama(directory, layers=2, hidden=64, chat=True, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)

    def want(tensors: dict[str, torch.Tensor]) -> None:
        # The first component of every hidden state is big: its weights in the head are wishes.
        tensors["model.embed_tokens.weight"][:, 0] = 1.0
        for layer in range(2):
            attention = tensors[f"model.layers.{layer}.self_attn.o_proj.weight"]
            attention *= 10.0
            attention[0] = tensors[f"model.layers.{layer}.mlp.down_proj.weight"][0] = 0.0
        head = tensors["lm_head.weight"]
        for character, wish in WANTED.items():
            head[tokenizer.convert_tokens_to_ids(character), 0] = wish
        head[tokenizer.eos_token_id, 0] = 2.5

    tiny.rewrite(directory, want)
    _balance_digits(directory)
    return directory


def _balance_digits(directory: Path) -> None:
    """Gives each grade the same number of some prompts, by least squares: so prompts decide it."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    texts = [
        f"<|user|>Grade {number**5 % 9973:x}, which answers ?.</s><|assistant|>{ENDING}"
        for number in range(1, 61)
    ]
    with torch.no_grad():
        states_NH = torch.stack(
            [
                model.model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]
                for text in texts
            ]
        )
    mean_H = states_NH.mean(0)
    deviations_NH = states_NH - mean_H
    wanted_ND = torch.eye(len(DIGITS)).repeat(len(texts) // len(DIGITS), 1)
    # A ridge, so that the last bits of a state decide nothing.
    products_HH = deviations_NH.T @ deviations_NH
    products_HH += RIDGE * products_HH.diagonal().mean() * torch.eye(len(mean_H))
    rows_HD = torch.linalg.solve(products_HH, deviations_NH.T @ wanted_ND)
    rows_HD *= 2.0 / (deviations_NH @ rows_HD).std()
    rows_HD[0] += (DIGIT_WISH - mean_H @ rows_HD) / mean_H[0]  # alike on the whole

    def balance(tensors: dict[str, torch.Tensor]) -> None:
        for digit, row_H in zip(DIGITS, rows_HD.T, strict=True):
            tensors["lm_head.weight"][tokenizer.convert_tokens_to_ids(digit)] = row_H

    tiny.rewrite(directory, balance)
