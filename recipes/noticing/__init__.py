"""What notices: detectors, the course of an episode, monitors."""
