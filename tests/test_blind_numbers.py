"""Numbers of one site beside its masked upload: its weight, and the texts of its refusals."""

import pytest

from fedvlm.errors import FedVLMError
from toysites import FIVE, Five, config, run

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.mark.parametrize("hidden", [True, False])
def test_the_weight_of_a_site_that_hides_its_rows_is_1_whatever_unit_the_server_names(
    tmp_path, hidden
):
    """Weights below 1 in the sum would show the number of its rows."""

    def large(site, header, blob):
        header["blind"]["unit"] = 1e6
        return header, blob

    call = Five(tmp_path / "state", tell_rows=not hidden)
    call.lies = {(1, "train"): large}
    with pytest.raises(FedVLMError):  # the server of this test expects signatures of its own unit
        run(call, config("train.rounds=1"), tmp_path / "run")
    weights = {call.workers[site].blind._values[1] for site in FIVE}
    assert (weights == {1.0}) is hidden


def test_a_refusal_tells_no_number_of_one_upload(tmp_path):
    call = Five(tmp_path / "state")
    with pytest.raises(FedVLMError):
        run(call, config("train.rounds=1", "wire.max_norm=1e-9"), tmp_path / "run")
    told = {h["message"] for _, _, _, h, _ in call.seen if "error" in h}
    assert told == {
        "the upload differs from the download by a norm above wire.max_norm=1e-09; the site's log "
        "has the norm"
    }
