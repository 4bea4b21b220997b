"""Why the Hugging Face hub gave nothing, in words; its libraries' own errors run over many lines."""

_UNREACHABLE = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "TransportError", "TimeoutError"}


def why(error: Exception, page: str) -> str:
    """The reason and, where there is one, the remedy. `page`: the address of what was asked for.

    The hub's classes are known by name: they are there only where its library is installed.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return f"its publisher asks for consent first: give it at {page}, then `hf auth login`"
    if "RepositoryNotFoundError" in kinds:
        return "the hub has none of this name, or it is private (then `hf auth login` first)"
    if "RevisionNotFoundError" in kinds:
        return "it has no such revision"
    if kinds & _UNREACHABLE:
        below = error.__cause__ or error
        return f"the hub cannot be reached ({type(below).__name__}), and it is not in the hub's cache here"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words if len(words) <= 160 else words[:160].rsplit(' ', 1)[0] + ' …'}"
