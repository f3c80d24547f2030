"""What is due after a step, by hand."""

from types import SimpleNamespace

from trainer.loop.periodic import PeriodicTasks

ALL = {"log", "validate", "save"}


def done(bad=(), **intervals) -> dict[int, set[str]]:
    """Seven steps, of which some were bad -> what is done after each, where there is anything."""
    defaults = dict(log_interval=2, save_interval=3, val_interval=0)
    tasks, found = PeriodicTasks(SimpleNamespace(**defaults | intervals), total_steps=7), {}
    for step in range(1, 8):
        found[step] = tasks.defer_if_bad(tasks.due(step), step, sound=step not in bad)
    return {step: names for step, names in found.items() if names}


def test_intervals_and_the_last_step():
    """--val_interval 0 validates at every save; the last step has everything."""
    assert done() == {2: {"log"}, 3: {"validate", "save"}, 4: {"log"}, 6: ALL, 7: ALL}
    assert done(save_interval=0, val_interval=4) == {2: {"log"}, 4: {"log", "validate"}, 6: {"log"}, 7: ALL}


def test_a_bad_step_puts_off_validating_and_saving():
    """Steps 3 and 4 are bad: what was due at 3 is done after 5, and the log of 4 is written all the same."""
    assert done(bad=(3, 4)) == {2: {"log"}, 4: {"log"}, 5: {"validate", "save"}, 6: ALL, 7: ALL}
    assert done(bad=(6, 7))[6] == {"log"} and done(bad=(6, 7))[7] == ALL
