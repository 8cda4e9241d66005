"""What Ray Serve is asked for."""

from typing import Any

import pytest

from serving.cluster import app


@pytest.mark.parametrize(("asked", "waiting"), [({}, 40), ({"max_queued": 4}, 4)], ids=["default", "given"])
def test_no_more_wait_for_a_gateway_than_it_says(asked: dict[str, Any], waiting: int) -> None:
    made: Any = app.gateway({"spec": {"max_streams": 40, **asked}})
    config = made._bound_deployment._deployment_config
    assert (config.max_ongoing_requests, config.max_queued_requests) == (40, waiting)
