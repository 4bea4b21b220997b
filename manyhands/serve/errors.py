"""What the server answers when it does not do what was asked: a status and OpenAI's error object."""

from manyhands.engine.asked import Overloaded, Stopping
from manyhands.errors import CheckpointError, ManyhandsError, UserError


class ApiError(Exception):
    """An answer that is an error. `param` names the field at fault, with its place: `messages[2].content`."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code

    def body(self) -> dict[str, dict[str, str | None]]:
        """`{"error": {…}}`, as clients of OpenAI's interface read it."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def wrong(param: str, message: str) -> ApiError:
    """A 400 for a field of the body."""
    return ApiError(400, f"{param}: {message}", param=param)


def as_api_error(error: ManyhandsError | TimeoutError) -> ApiError:
    """What the engine or the text rooms raised, as an answer."""
    if isinstance(error, TimeoutError):
        return ApiError(504, "the request took longer than the server allows", "timeout_error", code="timeout")
    if isinstance(error, Overloaded):
        return ApiError(429, str(error), "rate_limit_error", code="overloaded")
    if isinstance(error, Stopping):
        return ApiError(503, str(error), "unavailable_error", code="stopping")
    if isinstance(error, CheckpointError):  # a chat template that fails, say
        return ApiError(400, str(error), param="model")
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    return ApiError(500, str(error), "server_error")
