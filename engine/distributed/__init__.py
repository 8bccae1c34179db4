"""One run of several processes: who takes part, shared training steps, and none waits in vain."""
