"""Rounds at a steady pace, in processes with this folder on their path.

Python imports this file when it starts. In a site's worker, the variable ``PACE`` gives a time, in
seconds since 1970, and a period in seconds. Round ``n`` trains ``n`` periods after that time. A run
that is late catches up, and waits for half of a period between two rounds. So a run of small rounds
takes hours without keeping a processor busy.
"""

import os
import sys
import time


def install():
    from fedvlm.deploy.site import Site

    begin, period = map(float, os.environ["PACE"].split())
    trains, last = Site.train, [0.0]

    def train(self, round_, *more):
        if round_ <= self.config.train.rounds:  # not the steps after the last round
            due = max(begin + round_ * period, last[0] + period / 2)
            time.sleep(max(0.0, due - time.time()))
            last[0] = time.time()
        return trains(self, round_, *more)

    Site.train = train


if "fedvlm.deploy.worker" in sys.orig_argv and "PACE" in os.environ:
    install()
