"""The rubric: what a judge is told about an answer, and the grades that it may give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from evomerge.evaluate.ledger import storable
from evomerge.evaluate.prompts import render_template
from evomerge.evaluate.task import GradeRequest


@dataclass(frozen=True)
class Rubric:
    """What the judge is told: a Jinja template, and the whole numbers that it may give.

    The template may use what the suite knows of the task (input, reference, category and its
    further columns, as eval_aspect), the `answer`, and `turns`: all turns up to that answer, as
    {user, answer}. `empty`: the grade of an answer without words, which the judge is then not asked
    for; None: it is asked. `where` names the suite in messages.
    """

    prompt: str
    low: int
    high: int
    empty: float | None = None
    where: str = "suite"

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of a reply: the reason comes before the grade, so that it decides it."""
        grade = {"type": "integer", "enum": list(range(self.low, self.high + 1))}
        return {
            "type": "object",
            "properties": {"reason": {"type": "string"}, "grade": grade},
            "required": ["reason", "grade"],
            "additionalProperties": False,
        }

    def question(self, request: GradeRequest) -> str:
        """The prompt about one answer. Raises ConfigError where the template fails for it."""
        task = request.task
        users = (task.user, *task.turns)
        answers = (*request.earlier, request.answer)
        fields: dict[str, Any] = {
            **task.fields,
            "id": task.id,
            "category": task.category,
            "input": task.input,
            "reference": task.reference,
            "answer": request.answer,
            "turns": [
                {"user": user, "answer": answer}
                for user, answer in zip(users, answers, strict=False)
            ],
        }
        # Halves of surrogates can be sent nowhere; they would end the run.
        where = f"{self.where}: judge: task {task.id}"
        return storable(render_template(self.prompt, fields, where))
