"""What the server answers when it does not do what was asked: a status and OpenAI's error object."""


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
