"""The whole loop on real parts: train, promote, serve, shift, alarm, retrain, swap; lived through once and looked at."""


def test_no_request_failed(finished_loop):
    assert finished_loop["requests"]["failed"] == 0, finished_loop["requests"]["last_failure"]
