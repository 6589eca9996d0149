"""benchmarks.networks: every network is timed in both formulations."""

import re

from benchmarks import networks


def test_output_has_a_row_per_network_and_the_machine_readable_line(monkeypatch, capsys, policy):
    monkeypatch.setattr(networks, "WARM_UP", 0)
    monkeypatch.setattr(networks, "POLICIES", {"eager": "eager", "fused": "native"})
    names = networks.WRITTEN, networks.TRACED
    networks.main([f"--networks={','.join(names)}", "--images=2", "--size=32", "--rounds=1"])
    lines = capsys.readouterr().out.splitlines()
    for name in names:
        assert any(re.fullmatch(rf"\| {name} \| \d+ \| \d+ \| \d+\.\d\d \|", line) for line in lines)
    assert re.fullmatch(r"traced_over_written=\d+\.\d\d\d", lines[-1])
