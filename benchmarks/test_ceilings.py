"""What the machine can do at best."""

SUITES = ("ceilings",)


def test_ceiling(measured):
    assert measured.ok, measured.status
