"""Classes that other frameworks load by their import path. Each module needs the framework that it is named after."""
