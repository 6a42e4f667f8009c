"""Which of several parts that decide is named first: the one that is most like a trigger.

Natural parts may decide most inputs, too: one word that is all praise, or five words of some. A trigger decides more of
them, with less. How many inputs have it says nothing: a word of praise is in more of them than a trigger in 1 of 200.
"""

from collections.abc import Sequence

from atpatch_onnx.discovery.transplant import Transplant


def ranked(tested: Sequence[Transplant]) -> list[Transplant]:
    """Parts that were tested, the most decisive first.

    Those whose interval reaches the lower end of the best one's are as decisive, as far as the test sees. Of these, the
    narrowest comes first: the one of the fewest tokens; of the narrowest, the one that most inputs have.
    """
    left, found = [(one, one.success) for one in tested if one.success is not None], list[Transplant]()
    while left:
        best = max(success.low for _, success in left)
        alike = [one for one, success in left if success.high >= best]
        found += sorted(alike, key=lambda one: (len(one.tokens), -len(one.group.members)))
        left = [(one, success) for one, success in left if success.high < best]
    return found
