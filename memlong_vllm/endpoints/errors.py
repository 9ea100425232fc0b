"""Errors as OpenAI's clients expect them: ``{"error": {"message", "type", …}}``."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse

# Of classes of memlong_vllm.memories, by name: that is how they come from the engine.
_STATUS = {
    "MemoryNameError": 400,
    "OperationError": 400,
    "IndexSettingsError": 400,
    "UnknownMemoryError": 404,
    "MemoryExistsError": 409,
    "MemoryLibraryBusyError": 409,
    "MemoryFormatError": 409,
    "MemoryWriteError": 409,
    "QuotaExceededError": 413,
    "MemoryDamagedError": 422,
}


class EndpointError(Exception):
    """A call that is refused.

    Attributes:
        status: of HTTP.
        kind: the class of the error, for programs to tell them apart.
    """

    def __init__(self, status: int, message: str, kind: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind

    def response(self) -> JSONResponse:
        body = {"message": str(self), "type": self.kind, "param": None, "code": self.status}
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else None
        return JSONResponse({"error": body}, self.status, headers)


def library_error(message: str, kind: str) -> EndpointError:
    """What an error of the library is over HTTP.

    Args:
        kind: the error's class.
    """
    return EndpointError(_STATUS.get(kind, 500), message, kind)


async def handle_endpoint_error(request: Request, error: Exception) -> JSONResponse:
    """For ``FastAPI.add_exception_handler``."""
    assert isinstance(error, EndpointError)
    return error.response()
