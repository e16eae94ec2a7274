"""A process that reads nothing and does not end; takes the place of one that should."""

import time

if __name__ == '__main__':
    time.sleep(600)
