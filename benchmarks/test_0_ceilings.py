"""What the machine can do at best. First of all files, since everything else is compared with it."""

SUITES = ("ceilings",)


def test_ceiling(measured):
    assert measured.ok, measured.status
