"""`backend = "tinker"`: a Tinker service samples and trains; this process judges, credits tokens and keeps the records.

service.py is the door to the SDK: waiting with patience, what failures mean. datums.py is what is sent, archive.py what
is downloaded, backend.py the Backend made of them. Importing this package imports no SDK.
"""

from retrain.backend.tinker.backend import TinkerBackend

__all__ = ["TinkerBackend"]
