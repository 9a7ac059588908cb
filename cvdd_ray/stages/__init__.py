"""One file per verb, each a visible loop over a runtime and a store; no Ray."""
