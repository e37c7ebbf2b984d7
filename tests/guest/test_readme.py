"""The example in the README runs."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "packages" / "substrate-guest" / "README.md"


def test_the_example_answers_as_it_says(start):
    [example] = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    guest = start(source=example)
    guest.restored()
    reply = guest.ask(target="/invoke/s1", body=b'{"name": "you"}')
    assert (reply.json(), reply.headers["x-model"]) == ({"said": "hello, you", "session": "s1"}, "1")
