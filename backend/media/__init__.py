"""Bytes to pictures and back: the only place where a caller's media are decoded or fetched."""


class Refused(Exception):
    """Media that are not taken. The message ends a sentence that begins with the field's name.

    It says nothing of our network or files. ``too_large`` is true where size was the reason.
    """

    def __init__(self, message: str, *, too_large: bool = False) -> None:
        super().__init__(message)
        self.too_large = too_large
