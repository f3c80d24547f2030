"""What a stage says about its data before it starts."""

from trainer import inputs


def test_data_larger_than_memory_belongs_on_an_ssd(monkeypatch):
    monkeypatch.setattr(
        inputs.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1_000_000}.__getitem__, raising=False
    )
    assert inputs.random_reads(4_096_000_000) == []
    [note] = inputs.random_reads(8_000_000_000)
    assert "8.0 GB of tokens do not fit into 4.1 GB of memory" in note and "--cache_dir" in note
