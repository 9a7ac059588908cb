"""`cvdd bench`: this package against a plain reference, on the machine where it is run."""
