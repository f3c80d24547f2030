"""Fixtures of the training tests."""

import signal

import pytest

from trainer.loop.engine import Engine


@pytest.fixture
def stop_at(monkeypatch):
    """Sends this process SIGTERM while it computes the step with the given number."""

    def arrange(number: int | None):
        monkeypatch.undo()
        update = Engine.train_step

        def counted(self, *args):
            if number is not None and self.step == number:
                signal.raise_signal(signal.SIGTERM)
            return update(self, *args)

        monkeypatch.setattr(Engine, "train_step", counted)

    return arrange
