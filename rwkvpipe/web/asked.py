"""What OpenAI's interface lets a client ask, checked: honoured, or refused naming the parameter."""

import json
import secrets
from dataclasses import dataclass
from typing import Any, Literal

from rwkvpipe.base.config import SamplingConfig
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.base.strict import Factor, Penalty, Real, Share, Strict, Whole, check
from rwkvpipe.infer.engine import Engine
from rwkvpipe.infer.layout import Layout

SAMPLES = 128
SWITCHES = ("stream", "logprobs", "echo")
FREE = {"choices": (), "regex": None, "json_schema": None}
FORM = 8000  # characters of what says how an answer must look
LIKELY = {"chat": 20, "text": 5}  # alternatives that may be asked for


class Refused(Exception):
    """A request that is not answered: HTTP status, what is wrong, which parameter, and a code if there is one."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict:
        """The error as OpenAI's clients read it."""
        kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(Strict):
    """What a stream tells besides."""

    include_usage: bool | None = None


class Common(Strict):
    """Parameters of both kinds of request. The last six are not OpenAI's."""

    model: str
    temperature: Real | None = None
    top_p: Share | None = None
    max_tokens: Whole | None = None
    n: Whole | None = None
    seed: int | None = None
    stop: str | tuple[str, ...] | None = None
    presence_penalty: Real | None = None
    frequency_penalty: Real | None = None
    logit_bias: dict[int, Penalty] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    top_k: Whole | None = None
    repetition_penalty: Factor | None = None
    penalty_decay: Share | None = None
    guided_choice: tuple[str, ...] | None = None
    guided_regex: str | None = None
    guided_json: dict[str, Any] | None = None


class Message(Strict):
    """A turn of a talk."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | tuple[dict[str, Any], ...]
    name: str | None = None
    tool_call_id: str | None = None


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: tuple[Message, ...]
    max_completion_tokens: Whole | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = None
    response_format: dict[str, Any] | None = None


class TextRequest(Common):
    """POST /v1/completions."""

    prompt: Any = ""
    logprobs: Whole | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: Whole | None = None


@dataclass(frozen=True)
class Asked:
    """A request in the engine's terms."""

    kind: Literal["chat", "text"]
    prompts: list[list[int]]
    sampling: SamplingConfig
    samples: int
    top: int | None
    stream: bool
    usage: bool


class House:
    """What a server serves: an engine under a name, with what requests leave open."""

    def __init__(self, engine: Engine, name: str, defaults: SamplingConfig, layout: Layout | None = None):
        self.engine, self.name, self.defaults, self.layout = engine, name, defaults, layout or Layout()

    def read(self, kind: Literal["chat", "text"], body: Any) -> Asked:
        """A request's JSON, understood. Raises Refused."""
        model = ChatRequest if kind == "chat" else TextRequest
        if not isinstance(body, dict):
            raise Refused(400, f"a mapping of parameters is needed, this is {type(body).__name__}")
        for name, value in body.items():
            if isinstance(value, bool) and name not in SWITCHES:
                raise Refused(400, f"{name}: {str(value).lower()} is no value of it", name)
        try:
            given = check(model, body, "the request")
        except ConfigError as error:
            message = str(error).removeprefix("the request: ")
            raise Refused(400, message, message.partition(":")[0] or None) from None
        if given.model != self.name:
            raise Refused(
                404, f"there is no model {given.model!r} here; known: {self.name}", "model", "model_not_found"
            )
        top = self._top(kind, given)
        try:
            prompts = [self._talk(given)] if kind == "chat" else self._prompts(given.prompt)
        except DataError as error:
            raise Refused(400, str(error), "messages" if kind == "chat" else "prompt") from None
        samples = _within("n", 1 if given.n is None else given.n, 1, SAMPLES)
        streamed = bool(given.stream)
        if given.stream_options is not None and not streamed:
            raise Refused(400, "stream_options belong to stream: true", "stream_options")
        usage = bool(given.stream_options and given.stream_options.include_usage)
        return Asked(kind, prompts, self._sampling(kind, given), samples, top, streamed, usage)

    def _top(self, kind: str, given: Any) -> int | None:
        """How many alternatives are told beside each token."""
        if kind == "text":
            for name in ("echo", "suffix"):
                if getattr(given, name):
                    raise Refused(400, f"{name} is not offered here; leave it out", name)
            if given.best_of not in (None, given.n or 1):
                raise Refused(400, "best_of is not offered here; leave it out", "best_of")
            return None if given.logprobs is None else _within("logprobs", given.logprobs, 0, LIKELY[kind])
        if given.top_logprobs is not None and not given.logprobs:
            raise Refused(400, "top_logprobs belong to logprobs: true", "top_logprobs")
        return _within("top_logprobs", given.top_logprobs or 0, 0, LIKELY[kind]) if given.logprobs else None

    def _talk(self, given: ChatRequest) -> list[int]:
        """Ids of a talk, up to where the assistant speaks."""
        if not given.messages:
            raise Refused(400, "messages: one turn at least is needed", "messages")
        talk = []
        for n, message in enumerate(given.messages):
            content = message.content
            if not isinstance(content, str):
                if any(set(part) != {"type", "text"} or part["type"] != "text" for part in content):
                    raise Refused(400, f"messages.{n}.content: parts must be texts", f"messages.{n}.content")
                if not all(isinstance(part["text"], str) for part in content):
                    raise Refused(400, f"messages.{n}.content: a text is no text", f"messages.{n}.content")
                content = "\n".join(part["text"] for part in content)
            talk.append({"role": "system" if message.role == "developer" else message.role, "content": content})
        return self.engine.begin(self.layout.text(talk))

    def _prompts(self, prompt: Any) -> list[list[int]]:
        """One prompt or several, as texts or as ids."""
        if isinstance(prompt, str):
            return [self.engine.begin(prompt)]
        if not isinstance(prompt, list) or not prompt or len(prompt) > SAMPLES:
            raise Refused(400, f"prompt: a text, ids, or a list of up to {SAMPLES} of them is needed", "prompt")
        if all(isinstance(part, str) for part in prompt):
            return [self.engine.begin(part) for part in prompt]
        rows = prompt if all(isinstance(part, list) for part in prompt) else [prompt]
        owned = self.engine.words.owned
        for row in rows:
            if not row or not all(type(n) is int and 0 <= n < len(owned) and owned[n] for n in row):
                raise Refused(400, "prompt: ids must be whole numbers that the vocabulary owns", "prompt")
        return rows

    def _sampling(self, kind: str, given: Any) -> SamplingConfig:
        base = self.defaults
        limit = given.max_tokens
        if kind == "chat" and given.max_completion_tokens is not None:
            limit = given.max_completion_tokens
        stops = () if given.stop is None else (given.stop,) if isinstance(given.stop, str) else given.stop
        if len(stops) > 16 or any(not text or len(text) > 1000 for text in stops):
            raise Refused(400, "stop: up to 16 texts of 1 to 1000 characters", "stop")
        forms = _forms(kind, given)
        if odd := [number for number in given.logit_bias or () if not 0 <= number < self.engine.words.size]:
            raise Refused(400, f"logit_bias: there is no id {odd[0]}", "logit_bias")
        asked = {
            "temperature": _within("temperature", given.temperature, 0, 2),
            "top_p": given.top_p,
            "max_tokens": _within("max_tokens", limit, 1, base.max_tokens),
            "seed": secrets.randbits(62) if given.seed is None else given.seed % 2**63,
            # in a talk the end of the turn ends the text, too
            "stop": tuple(dict.fromkeys((*stops, *(base.stop if kind == "chat" else ())))),
            "presence": _within("presence_penalty", given.presence_penalty, -2, 2),
            "frequency": _within("frequency_penalty", given.frequency_penalty, -2, 2),
            "bias": given.logit_bias,
            "top_k": given.top_k,
            "repetition_penalty": given.repetition_penalty,
            "decay": given.penalty_decay,
        }
        asked = {name: value for name, value in asked.items() if value is not None}
        return base.model_copy(update=asked | (FREE | forms if forms else {}))


def _forms(kind: str, given: Any) -> dict[str, Any]:
    """What an answer must be, whole: one of some texts, or what fits a regular expression or a JSON schema."""
    found = {"choices": given.guided_choice, "regex": given.guided_regex, "json_schema": given.guided_json}
    said = {"choices": "guided_choice", "regex": "guided_regex", "json_schema": "guided_json"}
    asked = given.response_format if kind == "chat" else None
    if asked not in (None, {"type": "text"}):
        described = asked.get("json_schema") if asked.get("type") == "json_schema" else {"schema": {"type": "object"}}
        schema = described.get("schema") if isinstance(described, dict) else None
        if asked.get("type") not in ("json_object", "json_schema") or not isinstance(schema, dict):
            raise Refused(400, "response_format: text, json_object, or json_schema with a schema", "response_format")
        if given.guided_json is not None:
            raise Refused(400, "response_format and guided_json say the same; give one of them", "response_format")
        found["json_schema"], said["json_schema"] = schema, "response_format"
    found = {name: value for name, value in found.items() if value is not None and value != ()}
    if len(found) > 1:
        raise Refused(400, f"{' and '.join(said[name] for name in found)}: give one of them", said[next(iter(found))])
    for name, value in found.items():
        if len(json.dumps(value)) > FORM:
            raise Refused(400, f"{said[name]}: more than {FORM} characters", said[name])
    return found


def _within(name: str, value: Any, least: float, most: float) -> Any:
    """A value in its range. Raises Refused."""
    if value is not None and not least <= value <= most:
        raise Refused(400, f"{name}: {value} is not from {least} to {most}", name)
    return value
