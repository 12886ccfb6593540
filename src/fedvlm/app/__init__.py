"""The playground: a page on this machine where a person asks a run's models about pictures."""
