"""Rounds at a steady pace, in processes with this folder on their path.

Python imports this file when it starts. In a site's worker, the variable ``PACE`` gives a time, in
seconds since 1970, and a period in seconds. Round ``n`` trains ``n`` periods after that time, or
at once where that is past. A run of small rounds then takes hours without keeping a processor busy.
"""

import os
import sys
import time


def install():
    from fedvlm.deploy.site import Site

    begin, period = map(float, os.environ["PACE"].split())
    trains = Site.train

    def train(self, round_, *more):
        if round_ <= self.config.train.rounds:  # not the steps after the last round
            time.sleep(max(0.0, begin + round_ * period - time.time()))
        return trains(self, round_, *more)

    Site.train = train


if "fedvlm.deploy.worker" in sys.orig_argv and "PACE" in os.environ:
    install()
