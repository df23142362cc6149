"""Every error that capsight raises on purpose; each message says what to do next."""


class CapsightError(Exception):
    """Base of all errors raised by capsight. Catch this one to handle any of them."""


class OptionError(CapsightError, ValueError):
    """An option has a value outside its range, or options contradict each other."""


class LayoutError(CapsightError, ValueError):
    """A prompt's tokens do not form a layout (image without delimiters, grid that does not fit...)."""


class UnsupportedModelError(CapsightError):
    """The model's architecture is not one that capsight knows how to read."""


class ModelMismatchError(CapsightError):
    """A capsule or head-map file was made for another model."""


class CapsuleFileError(CapsightError):
    """A file on disk is missing, truncated, tampered with, or of a format we do not read."""


class CalibrationError(CapsightError):
    """Calibration data is empty, too small, or holds NaN or infinite values."""


class UnlikeCalibrationWarning(UserWarning):
    """Pictures are far from those that a capsule was fitted to, and lose more than the others."""


class CapsuleStoreWarning(UserWarning):
    """A store could not give or take an image; it was read as without a store."""
