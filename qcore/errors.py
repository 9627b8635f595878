"""The errors that a caller may react to differently; the message is always one line.

Every message says what was wrong, what was observed, what is allowed, and what to do next. The command line prints
it as it is and exits with 1; nothing here knows about the command line.
"""


class QcoreError(Exception):
    """Base of all errors that a user can cause and mend."""


class ModelError(QcoreError):
    """The model file cannot be used: missing, not ONNX, external data, unsupported opset, no float weights."""


class DataError(QcoreError):
    """The data set or its card cannot be used: missing file, wrong shape, non-finite values, unknown field."""


class CalibrationError(QcoreError):
    """The calibration table does not belong to this model or lacks a tensor that is needed."""


class NotFiniteError(CalibrationError):
    """An activation is NaN or infinite: the samples may be at fault, or the model."""


class ConfigError(QcoreError):
    """A recipe, policy, target profile, data card or device file has an unknown field or a value out of range."""


class GateRefused(QcoreError):  # noqa: N818 - a refusal is a decision, not a fault
    """The evidence does not allow this release: not signed, not a pass, or about other bytes."""


class PackageError(QcoreError):
    """The package is not one that we made: wrong bytes, names, sizes or digests."""


class ReleaseError(QcoreError):
    """The repository refused or could not complete a change; the published state is unchanged."""


class DoubtfulWriteError(ReleaseError):
    """A store's answer was lost and the object was replaced since: whether our write counted is not known."""


class UpdateError(QcoreError):
    """The device refused or could not complete an update; the active model is unchanged."""
