"""Observers of a sweep: the console, TensorBoard, the pictures in the study, Ray's gauges."""

from __future__ import annotations

from collections.abc import Callable

from flowray.tune.records import TrialRecord


class Observer:
    """Is called with every trial's record as it changes; a method left out does nothing."""

    def known(self, trial: TrialRecord) -> None:
        """A trial that an earlier session left, as this one begins."""

    def started(self, trial: TrialRecord) -> None:
        """It trains from now on, from its first step or from where it was."""

    def probed(self, trial: TrialRecord) -> None:
        """It has reported a row."""

    def ended(self, trial: TrialRecord) -> None:
        """It trains no more, for good or for now."""


class Observers(Observer):
    """Several observers as one.

    A full disk costs whoever writes there its view, never the sweep.
    """

    def __init__(self, *observers: Observer):
        self._observers = list(observers)

    def known(self, trial: TrialRecord) -> None:
        self._tell(lambda observer: observer.known(trial))

    def started(self, trial: TrialRecord) -> None:
        self._tell(lambda observer: observer.started(trial))

    def probed(self, trial: TrialRecord) -> None:
        self._tell(lambda observer: observer.probed(trial))

    def ended(self, trial: TrialRecord) -> None:
        self._tell(lambda observer: observer.ended(trial))

    def _tell(self, event: Callable[[Observer], None]) -> None:
        for observer in list(self._observers):
            try:
                event(observer)
            except OSError:
                self._observers.remove(observer)
