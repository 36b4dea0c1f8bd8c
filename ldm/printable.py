"""Text that may come from a file, on its way to a terminal."""


def printable(text: str) -> str:
    """Without control characters, which are written out: names in a file must not command the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
