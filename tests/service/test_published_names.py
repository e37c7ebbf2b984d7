"""Names that others rest on are published, and the page does not lie."""

from service.published import PAGE, render


def test_the_page_of_events_and_metrics_says_what_the_code_does():
    """Every event with its fields, every metric with its labels, and nothing else."""
    assert PAGE.read_text() == render(), (
        "run `uv run python tests/service/published.py`, and tell who rests on the old names"
    )
