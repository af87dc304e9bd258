"""The bodies of requests, in OpenAI's form, with RWKV's additions; what a field may be is checked here."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, model_validator

from src.config.flags import THINK_MODES
from src.inference.sampling import SEED_LIMIT

MOST_CHOICES = 16
MOST_STOP_STRINGS = 16
MOST_TOP_LOGPROBS = 20  # OpenAI's limit
MOST_TOOLS = 128
MOST_INPUTS = 256
MOST_IGNORED = 50  # fields that are named, and characters of a name

Number = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)]
StopStrings = str | Annotated[list[str], Field(max_length=MOST_STOP_STRINGS)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MOST_INPUTS)]
Inputs = Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_INPUTS)]
Name = Annotated[str, Field(min_length=1, max_length=200)]


class Body(BaseModel):
    """A request. Fields that are not known are named in the answer's header x-ignored-fields."""

    model_config = ConfigDict(extra="allow")

    @property
    def ignored(self) -> str:
        """Their names, as a header may have them."""
        names = sorted(self.model_extra or ())[:MOST_IGNORED]
        return ", ".join(quote(name[:MOST_IGNORED]) for name in names)


class StreamOptions(BaseModel):
    include_usage: bool = False


class Generation(Body):
    """What all requests for text have. None: the server's default."""

    model: str = ""
    adapter: Name | None = None
    state: Name | None = None  # of /v1/states, or a tuned state that the server was started with
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    penalty_decay: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-SEED_LIMIT, lt=SEED_LIMIT)] | None = None
    stop: StopStrings | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: str | None = None  # a name that clients send; nothing depends on it

    @property
    def stop_strings(self) -> list[str]:
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in texts if text]

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and not isinstance((self.json_schema or {}).get("schema"), dict):
            raise ValueError("json_schema needs an object with the field schema")
        return self


class ChatMessage(BaseModel):
    """A turn. Its other fields (tool_calls, name, ...) are the chat template's."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None


class ChatCompletion(Generation):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: ResponseFormat | None = None
    think: Literal["on", "off", "short", "long"] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # {"enable_thinking": bool}, as other servers take it

    @property
    def think_mode(self) -> str:
        """A mode of THINK_MODES, or "" where the request says nothing."""
        if self.think is not None:
            assert self.think in THINK_MODES
            return self.think
        enabled = (self.chat_template_kwargs or {}).get("enable_thinking")
        if isinstance(enabled, bool):
            return "on" if enabled else "off"
        efforts = {"none": "off", "minimal": "off", "low": "short", "medium": "on", "high": "long"}
        return efforts.get(self.reasoning_effort or "", "")


class TextCompletion(Generation):
    prompt: str | TokenIds | Texts | Inputs
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    suffix: None = None  # text can't be inserted
    best_of: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class Embeddings(Body):
    model: str = ""
    adapter: Name | None = None
    input: str | TokenIds | Texts | Inputs
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Literal["mean", "last"] = "mean"
    dimensions: None = None
    user: str | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        if isinstance(self.input, str) or isinstance(self.input[0], int):
            return [self.input]  # type: ignore[list-item]
        return list(self.input)  # type: ignore[arg-type]


class SavedState(Body):
    """The state after `messages` (as the beginning of a conversation) or `prompt`, under a name."""

    name: Name
    model: str = ""
    adapter: Name | None = None
    messages: list[ChatMessage] | None = None
    prompt: str | None = None

    @model_validator(mode="after")
    def _has_one(self) -> SavedState:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("needs either messages or prompt")
        return self
