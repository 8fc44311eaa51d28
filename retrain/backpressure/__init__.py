"""The batch size, adapted to what the machine gives: `[backpressure]`."""

from __future__ import annotations

from retrain.backpressure.controller import Controller, open_controller
from retrain.backpressure.simulation import simulate
from retrain.backpressure.usl import Usl, fit_usl

__all__ = ["Controller", "Usl", "fit_usl", "open_controller", "simulate"]
