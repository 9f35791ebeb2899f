"""A running vLLM server as an engine: the same recipes, sent over HTTP.

The server is an ordinary one, started in an environment with evomerge installed, with
`--weight-transfer-config '{"backend": "evomerge"}'`, its sources in EVOMERGE_MODELS, and
VLLM_SERVER_DEV_MODE=1. Those routes have no key: let it listen on loopback only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import httpx

from evomerge.engine.base import (
    Completion,
    Each,
    EngineConfig,
    GenerationSettings,
    Loaded,
    Prompt,
)
from evomerge.engine.planning import (
    ASK_WORKERS,
    PlanningEngine,
    by_settings,
    failure_of,
    update_message,
)
from evomerge.errors import CandidateError, ConfigError, EngineDiedError, EvomergeError
from evomerge.recipe import Recipe

LONGEST_REQUEST_SECONDS = 3600.0
FIRST_CONTACT_SECONDS = 8.0


class VLLMServer(PlanningEngine):
    """The vLLM server at `config.url`; `config.model` is the directory that it serves.

    Batches form by arrival, so greedy answers may differ a little between identical requests.
    """

    name = "vllm"

    def __init__(self, config: EngineConfig) -> None:
        assert config.url is not None
        super().__init__(config)
        timeout = httpx.Timeout(LONGEST_REQUEST_SECONDS, connect=FIRST_CONTACT_SECONDS)
        # After an error the server closes its connection, maybe under the next request.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.Client(base_url=config.url, timeout=timeout, limits=limits)
        self._wrote_nan = False
        self._listed = self._first_contact()
        self._version = "default"

    def _first_contact(self) -> dict[str, Any]:
        try:
            answer = self._http.get("/v1/models", timeout=FIRST_CONTACT_SECONDS)
            models = answer.raise_for_status().json()["data"]
            if not models:
                raise ConfigError("it lists no model")
            self._post("/init_weight_transfer_engine", init_info={"models": self._sources()})
            if failure := self._failure():
                raise failure
        except (httpx.HTTPError, ValueError, LookupError, EvomergeError) as error:
            self._http.close()
            raise ConfigError(
                f"engine: url: {self.config.url}: {error}; start the server with evomerge "
                "installed, VLLM_SERVER_DEV_MODE=1, its sources in EVOMERGE_MODELS and "
                """--weight-transfer-config '{"backend": "evomerge"}'"""
            ) from error
        return dict(models[0])

    def _failure(self) -> EvomergeError | None:
        """What is wrong with the last message in any of the server's workers; None if nothing.

        Routes that take messages tell success all the same, so that the workers stay in step.
        """
        return failure_of(self._post("/collective_rpc", method=ASK_WORKERS)["results"])

    def _sources(self) -> list[str]:
        return [self.config.model, *self.config.sources]

    def load(self, recipe: Recipe) -> Loaded:
        start = time.perf_counter()
        plan = self.plan(recipe)
        if obstacle := self.obstacle(plan):
            raise ConfigError(
                f"the server at {self.config.url} cannot become this model: {obstacle}"
            )
        self._version = "in between"  # so that no answer of a switch that failed is believed
        self._post("/start_weight_update")
        message = update_message(recipe, plan, clear=self._wrote_nan)
        self._post("/update_weights", update_info=message)
        failure = self._failure()
        version = plan.digest if failure is None else f"failed {plan.digest}"
        self._post("/finish_weight_update", weight_version=version)
        if failure is not None:
            raise failure
        self._post("/reset_prefix_cache")
        self._wrote_nan = False
        self._version = plan.digest
        return Loaded(plan.digest, "live", time.perf_counter() - start)

    @property
    def max_model_len(self) -> int:
        return int(self._listed["max_model_len"])

    def generate(
        self,
        prompts: Sequence[Prompt],
        settings: GenerationSettings | Sequence[GenerationSettings],
        *,
        add_special_tokens: bool,
        each: Each | None = None,
    ) -> list[Completion]:
        return by_settings(
            prompts,
            settings,
            lambda some, alike: self._generate(some, alike, add_special_tokens=add_special_tokens),
            each,
        )

    def _generate(
        self, prompts: Sequence[Prompt], settings: GenerationSettings, *, add_special_tokens: bool
    ) -> list[Completion]:
        choices = self._complete(
            prompts,
            add_special_tokens,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            repetition_penalty=settings.repetition_penalty,
            stop=list(settings.stop),
            seed=settings.seed,
            return_token_ids=True,
            logprobs=0,  # of the chosen token alone: they tell a NaN
        )
        return [
            Completion(
                text=choice["text"],
                token_ids=tuple(choice["token_ids"]),
                finish_reason=choice["finish_reason"],
                prompt_tokens=len(choice["prompt_token_ids"]),
                version=self._version,
            )
            for choice in choices
        ]

    def log_probabilities(
        self, prompts: Sequence[Prompt], *, add_special_tokens: bool
    ) -> list[list[float]]:
        choices = self._complete(
            prompts,
            add_special_tokens,
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            return_token_ids=True,
        )
        return [
            [
                float(position[str(token)]["logprob"])
                for token, position in zip(
                    choice["prompt_token_ids"], choice["prompt_logprobs"], strict=True
                )
                if position is not None
            ]
            for choice in choices
        ]

    def _complete(
        self, prompts: Sequence[Prompt], add_special_tokens: bool, **request: Any
    ) -> list[dict[str, Any]]:
        """The choices for `prompts`, in their order, all written by the present candidate."""
        ids = self.encode(prompts, add_special_tokens=add_special_tokens)
        answer = self._post("/v1/completions", model=self._listed["id"], prompt=ids, **request)
        version = self._send("GET", "/weight_info")["weight_version"]
        if version != self._version:
            raise EngineDiedError(
                f"{self.config.url} was switched to {version} by somebody else while it wrote "
                f"answers for {self._version}"
            )
        return sorted(answer["choices"], key=lambda choice: int(choice["index"]))

    def _post(self, route: str, **body: Any) -> Any:
        return self._send("POST", route, json=body)

    def _send(self, method: str, route: str, **request: Any) -> Any:
        try:
            response = self._http.request(method, route, **request)
        except httpx.HTTPError as error:
            raise EngineDiedError(f"{self.config.url}{route}: {error!r}") from error
        if response.is_success:
            return response.json() if response.content else None
        if "not JSON compliant" in response.text:  # what the server says of a NaN log-probability
            self._wrote_nan = True
            raise CandidateError("its logits are NaN: activations overflow")
        raise EngineDiedError(f"{self.config.url}{route}: {response.status_code} {response.text}")

    def close(self) -> None:
        self._http.close()
