"""Differential privacy and secure aggregation together, over real sites with the bundled model."""

import fedvlm
from fedvlm.deploy import peers
from fedvlm.deploy.spending import Spending
from fedvlm.store import files
from sites import SITES, Here, config, deployed, written
from test_private_site import LIMIT, PRIVATE, heads

SECURE = ("algorithm.name=lora", "wire.secure=true", "aggregate.kind=mean", "train.rounds=2")


def test_the_server_gets_the_mean_of_noisy_uploads_and_every_site_is_charged(tmp_path):
    table = fedvlm.scenes(style="concept", sites=3, rows=30).to_pandas()
    table.to_parquet(tmp_path / "all.parquet", index=False)
    for site in SITES:
        table[table["site"] == site].to_parquet(tmp_path / f"{site}.parquet", index=False)
    state = tmp_path / "state"
    marks = {site: peers.identity(state / site, site).fingerprint for site in SITES}
    asked = {**LIMIT, "secure_required": True, "peers": marks}
    call, events = Here(tmp_path, state, written(state / "policy.yml", **asked)), []
    settings = config(tmp_path, *PRIVATE, *SECURE)
    results = deployed(call, settings, tmp_path / "run", events=events, at_once=3)

    lines = files.read_lines(results.folder / "metrics.jsonl")
    assert [line["secure"] for line in lines[1:]] == [{"clients": list(SITES), "loss": None}] * 2
    assert not any("loss" in head for head in heads(call)), "no loss leaves a site"
    server = files.load_tree(results.folder / "adapters/global/adapter_model.safetensors")
    own = [
        files.load_tree(state / site / "runs/run-1/rounds/00002/upload.safetensors")
        for site in SITES
    ]
    moved = 0
    for name, found in server.items():
        mean = sum(tree[name].double() for tree in own) / len(own)
        assert (found - mean).abs().max() < 2e-5, name
        moved += int(any((tree[name] - found).abs().max() > 1e-3 for tree in own))
    assert moved > len(server) / 2, "the sites' uploads differ: each has noise of its own"
    for site in SITES:
        spending = Spending(state / site)
        with spending.locked():
            assert [charge.round for charge in spending.charges()] == [1, 2]
